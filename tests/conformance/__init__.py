"""Chats x chat templates x containers with the supervised text expected of each."""
