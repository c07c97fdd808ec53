"""Datasets and chat formats -> tokenised, masked samples with stable identities and a split."""
