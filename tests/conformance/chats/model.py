"""What a chat of the corpus is: its row, and the turns that a reader finds in the row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Call", "Chat", "Turn", "answer", "as_message", "call_row", "chat", "inline_text", "result",
    "system", "user",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def json(self) -> str:
        """The arguments as templates print them."""
        return json.dumps(self.arguments, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn as a person reads it out of the row; the last five fields are for answers."""

    role: str
    """system, user, assistant or tool."""
    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    inline: bool = False
    """The reasoning stands in the row's content, between <think> and </think>."""
    supervised: bool = True
    open: bool = False
    """The row says that the answer goes on: nothing ends the turn."""
    said: str = ""
    """The beginning of the content that a prompt holds: context."""

    @property
    def empty(self) -> bool:
        """The assistant wrote nothing."""
        return not (self.content.strip() or self.reasoning.strip() or self.calls)


@dataclass(frozen=True, slots=True)
class Chat:
    """A row and what it holds."""

    name: str
    row: dict[str, Any]
    turns: tuple[Turn, ...]
    format: str = "messages"
    arrow: str = "plain"
    """Chats of one name here have one Arrow schema; empty: Arrow cannot hold the row."""
    tools: bool = False
    bad: str = ""
    """Why the row can be used under no template."""


def system(text: str) -> Turn:
    """Return a turn of the system."""
    return Turn("system", text)


def user(text: str = "What is new?") -> Turn:
    """Return a turn of the user."""
    return Turn("user", text)


def result(text: str) -> Turn:
    """Return what a tool gave back."""
    return Turn("tool", text)


def answer(text: str = "", **fields: Any) -> Turn:
    """Return a turn of the assistant."""
    return Turn("assistant", text, **fields)


def inline_text(turn: Turn) -> str:
    """Return the content that a row with inline reasoning has."""
    return f"<think>\n{turn.reasoning}\n</think>\n\n{turn.content}"


def call_row(call: Call, *, number: int = 1, as_text: bool = False) -> dict[str, Any]:
    """Return an item of `tool_calls`, its arguments as an object or as JSON text."""
    arguments = call.json if as_text else dict(call.arguments)
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{number}", "type": "function", "function": function}


def as_message(turn: Turn, *, as_text: bool = False) -> dict[str, Any]:
    """Return the usual message of a turn, without flags."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.inline:
        message["content"] = inline_text(turn)
    elif turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.calls:
        numbered = enumerate(turn.calls, start=1)
        message["tool_calls"] = [call_row(call, number=n, as_text=as_text) for n, call in numbered]
        message["content"] = turn.content or None
    if turn.role == "tool":
        message["tool_call_id"] = "call_1"
    return message


def chat(
    name: str,
    *turns: Turn,
    tools: list[Any] | str | None = None,
    as_text: bool = False,
    marks: Mapping[int, Mapping[str, Any]] | None = None,
    arrow: str | None = None,
    bad: str = "",
) -> Chat:
    """Return a chat whose row is the usual one of its turns.

    Args:
        name: what reports call it.
        turns: all of them, in order.
        tools: the column of that name.
        as_text: whether the arguments of calls are JSON text.
        marks: further keys of the messages, by the number of the message from 0.
        arrow: the schema, if it is an unusual one.
        bad: why no template can use the row.
    """
    messages = [as_message(turn, as_text=as_text) for turn in turns]
    for number, extra in (marks or {}).items():
        messages[number] |= extra
    row: dict[str, Any] = {"messages": messages}
    if tools is not None:
        row["tools"] = tools
    schema = arrow if arrow is not None else "strings" if as_text else "plain"
    return Chat(name, row, turns, arrow=schema, tools=bool(tools), bad=bad)
