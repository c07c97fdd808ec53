"""The chats, by what they are about."""

from __future__ import annotations

from tests.conformance.chats import formats, tools, turns, writing
from tests.conformance.chats.model import Call, Chat, Turn

__all__ = ["CHATS", "Call", "Chat", "Turn"]

CHATS: tuple[Chat, ...] = (*turns.CHATS, *writing.CHATS, *tools.CHATS, *formats.CHATS)
assert len({chat.name for chat in CHATS}) == len(CHATS)
