"""Rows as conversations or documents: one shape of a message, whatever shape the data has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.corpus.chat.content import read_content, refuse_media, take_reasoning
from pipeline.corpus.chat.tool_calls import listed, take_tool_calls
from pipeline.corpus.chat.turn_flags import take_prefix, take_supervision
from pipeline.corpus.sources.rows import BadRow
from pipeline.corpus.sources.unfit import Unfit, described, kind_of_fault

__all__ = ["Conversation", "Document", "Message", "put_system", "read_messages", "role_of"]

Message = dict[str, Any]
"""`role` and `content` as text; where there are any, `reasoning_content` as text and `tool_calls`
with their arguments as objects; and further keys of chat templates (`name`, ...)."""

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


def put_system(item: Conversation, system: str) -> Conversation:
    """Put a system message before a conversation."""
    return replace(
        item,
        messages=[{"role": "system", "content": system}, *item.messages],
        first_supervised=item.first_supervised + 1,
        developer=frozenset(number + 1 for number in item.developer),
        unsupervised=frozenset(number + 1 for number in item.unsupervised),
    )


def read_messages(
    items: object, *, place: str, role_key: str, content_key: str, context: bool = False
) -> Conversation:
    """Read a list of messages, of any shape that data gives them; `None` means there are none.

    Args:
        items: a list, its JSON text, or an object of equally long lists.
        place: for messages.
        role_key: of each message.
        content_key: of each message.
        context: whether no message can be supervised, whatever its role.

    Raises:
        BadRow: an unknown role, a part that is not text, flags that cannot be honoured, or no list
            of messages.
    """
    messages = listed(items, place, "the conversation")
    if not isinstance(messages, (list, tuple)):
        raise BadRow(
            kind_of_fault(messages, "no list of messages"),
            f"{place}: the conversation is {described(messages)}",
            expected="a list of messages",
        )
    turns = [
        _read(item, f"{place}, message {number}", role_key, content_key, context)
        for number, item in enumerate(messages, start=1)
    ]
    for number, turn in enumerate(turns, start=1):
        if turn.prefix and (number < len(turns) or turn.message["role"] != "assistant"):
            raise BadRow(
                "a beginning that is not last",
                f"{place}, message {number}: 'prefix' marks the beginning of an answer",
                expected="it on the last message only, an answer of the assistant",
            )
    return Conversation(
        [turn.message for turn in turns],
        developer=frozenset(n for n, turn in enumerate(turns) if turn.developer),
        unsupervised=frozenset(n for n, turn in enumerate(turns) if turn.supervised is False),
        unfinished=bool(turns) and turns[-1].prefix,
    )


@dataclass(frozen=True, slots=True)
class _Turn:
    message: Message
    developer: bool = False
    supervised: bool | None = None
    prefix: bool = False


def _read(item: object, place: str, role_key: str, content_key: str, context: bool) -> _Turn:
    if isinstance(item, Unfit):
        raise BadRow(item.kind, f"{place}: is {item.what}", expected="a message")
    if not isinstance(item, Mapping) or item.get(role_key) is None:
        found = f"the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else repr(item)
        raise BadRow(
            "no role",
            f"{place}: has no {role_key!r} (found {found:.120})",
            expected=f"{role_key!r} and {content_key!r}",
        )
    role = _role(item[role_key], place)
    # Tables give every message all keys of any message: a null stands for an absent key.
    given = {str(key): value for key, value in item.items() if value is not None}
    given.pop(role_key)
    if given.pop(content_key, None) is None:
        _require_no_other_text(given, place, content_key)
    text, thoughts = read_content(item.get(content_key), place, role)
    message: Message = {"role": role, "content": text}
    developer = role == "system" and item[role_key].strip().lower() == "developer"
    if not given and not thoughts:
        return _Turn(message, developer)
    refuse_media(given, place)
    answer = role == "assistant"
    supervised = take_supervision(given, place, answer=answer and not context)
    prefix = take_prefix(given, place)
    if reasoning := take_reasoning(given, thoughts, place):
        message["reasoning_content"] = reasoning
    if calls := take_tool_calls(given, place):
        message["tool_calls"] = calls
    _require_one_meaning(given, message, place)
    return _Turn(given | message, developer, supervised if answer else None, prefix)


def role_of(name: object) -> str | None:
    """Return our role for a role's name in the data; None for one that is unknown."""
    return _ROLES.get(name.strip().lower()) if isinstance(name, str) else None


def _role(role: object, place: str) -> str:
    known = role_of(role)
    if known is None:
        raise BadRow(
            "unknown role",
            f"{place}: the role {role!r:.60} is unknown",
            expected=f"one of {', '.join(_ROLES)}",
            do="rename the role in the data",
        )
    return known


def _require_one_meaning(given: Mapping[str, Any], message: Message, place: str) -> None:
    """Refuse a message of `from` and `value` that has a `role` or `content` that differ."""
    role = given.get("role", message["role"])
    same_role = isinstance(role, str) and _ROLES.get(role.strip().lower()) == message["role"]
    if not same_role or given.get("content", message["content"]) != message["content"]:
        raise BadRow(
            "a message with two meanings",
            f"{place}: has two roles or two contents that differ",
            expected="one role and one content",
        )


def _require_no_other_text(given: Mapping[str, Any], place: str, content_key: str) -> None:
    for key in ("content", "value", "text", "message", "refusal"):
        if given.get(key):
            raise BadRow(
                "no text",
                f"{place}: has no {content_key!r}, but {key!r}",
                expected=f"the text in {content_key!r}",
            )
