"""Rows to conversations: formats, messages, their calls and flags; `rendering` goes on."""
