"""Rows as conversations or documents, with unified roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import CorpusError

__all__ = ["Conversation", "Document", "Message", "unify_messages"]

Message = dict[str, Any]
"""`role`, `content` as text, and further keys of chat templates (`tool_calls`, `name`, ...)."""

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for a chat template."""

    messages: list[Message]
    first_supervised: int = 0
    """Messages before this one are context only, whatever their role."""
    tools: list[Any] | None = None
    developer: frozenset[int] = frozenset()
    """Messages, by number from 0, whose role was `developer` before it became `system`."""
    unsupervised: frozenset[int] = frozenset()
    """Messages of the assistant, by number, that the data's own flags leave out of the loss."""
    unfinished: bool = False
    """Whether the last message is the beginning of an answer: no end of turn follows its text."""
    answer_prefix: str = ""
    """What the content of the message `first_supervised` begins with as context: the prompt ended
    inside that answer, and only the text after this is supervised."""


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text without roles."""

    text: str


def unify_messages(items: object, *, place: str, role_key: str, content_key: str) -> list[Message]:
    """Bring a list of messages to `role` and `content`; `None` means there are none.

    Raises:
        CorpusError: an unknown role, a part that is not text, or no list of messages.
    """
    if items is None:
        return []
    if not isinstance(items, (list, tuple)):
        raise CorpusError(
            f"{place}: the conversation is {type(items).__name__}", expected="a list of messages"
        )
    return [
        _unify(item, f"{place}, message {number}", role_key, content_key)
        for number, item in enumerate(items, start=1)
    ]


def _unify(item: object, place: str, role_key: str, content_key: str) -> Message:
    if not isinstance(item, Mapping) or role_key not in item:
        found = f"the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else repr(item)
        raise CorpusError(
            f"{place}: has no {role_key!r} (found {found:.120})",
            expected=f"{role_key!r} and {content_key!r}",
        )
    role = item[role_key]
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise CorpusError(
            f"{place}: the role {role!r} is unknown",
            expected=f"one of {', '.join(_ROLES)}",
            do="rename the role in the data",
        )
    # Parquet gives every message all keys of any message; a None stands for an absent key.
    extra = {
        str(key): value
        for key, value in item.items()
        if key not in (role_key, content_key) and value is not None
    }
    return {**extra, "role": known, "content": _text(item.get(content_key), place)}


def _text(content: object, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise CorpusError(
            f"{place}: the content is {type(content).__name__}", expected="text or a list of parts"
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise CorpusError(
                f"{place}: a content part of type {kind!r}",
                expected="text parts only: this pipeline distills language models without images",
            )
        texts.append(text)
    return "".join(texts)
