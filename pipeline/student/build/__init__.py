"""The student before its first step: initial weights, pruning, adapters, freezing, vocabulary."""
