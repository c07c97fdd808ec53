"""Conversations to text, text to token ids and a loss mask."""
