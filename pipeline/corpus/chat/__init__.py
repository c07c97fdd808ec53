"""Rows to conversations, conversations to text, text to token ids and a loss mask."""
