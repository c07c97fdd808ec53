"""Marks in place of what messages hold, to see where a template puts it and whether it does."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.corpus.chat.conversation import Message

__all__ = ["QUESTION", "Slot", "last_mark", "mark_calls", "mark_contents", "marks_in", "shape_of"]

QUESTION = "QXPROBEAQZJWVKQ"
"""A mark that `mark_contents` never gives."""
_MARK = re.compile(r"QXPROBEA[A-Q]+ZJWVKQ")


@dataclass(frozen=True, slots=True)
class Slot:
    """A text of a message that a mark stands for."""

    mark: str
    message: int
    """Number of the message, from 0."""
    key: str
    """`content`, or the key of the reasoning."""


def marks_in(text: str, slots: Sequence[Slot]) -> Iterator[tuple[int, Slot]]:
    """Yield the place and the slot of each mark in a text, in order, in one pass."""
    by_mark = {slot.mark: slot for slot in slots}
    for match in _MARK.finditer(text):
        slot = by_mark.get(match[0])
        if slot is not None:
            yield match.start(), slot


def last_mark(text: str) -> tuple[str, int] | None:
    """Return the last mark of a text and where it ends; None without one."""
    begin = text.rfind("QXPROBEA")
    match = _MARK.match(text, begin) if begin >= 0 else None
    return None if match is None else (match[0], match.end())


def mark_contents(
    messages: Sequence[Message], reasoning_key: str
) -> tuple[list[Message], list[Slot]]:
    """Put a mark in place of each content and each reasoning that is not blank.

    A blank one stays: templates ask whether there is any.
    """
    marked: list[Message] = []
    slots: list[Slot] = []
    for number, message in enumerate(messages):
        copy = dict(message)
        for key in ("content", reasoning_key):
            value = message.get(key)
            if isinstance(value, str) and value.strip():
                slot = Slot(_mark(len(slots)), number, key)
                slots.append(slot)
                copy[key] = slot.mark
        marked.append(copy)
    return marked, slots


def mark_calls(
    messages: Sequence[Message], tools: Sequence[Any] | None
) -> tuple[list[Message], list[Any] | None, list[tuple[str, str]]]:
    """Put marks in place of the names and arguments of tool calls and of the tools' names.

    Returns:
        The messages, the tools, and each mark with the name of what it stands for.
    """
    marks: list[tuple[str, str]] = []

    def new(what: str) -> str:
        marks.append((_mark(len(marks), "Z"), what))
        return marks[-1][0]

    def leaves(value: Any, what: str) -> Any:
        if isinstance(value, dict):
            return {new(what): leaves(item, what) for item in value.values()}
        if isinstance(value, list):
            return [leaves(item, what) for item in value]
        return new(what) if isinstance(value, str) else value

    def called(call: dict[str, Any], what: str) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": called(call["function"], what)}
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            arguments = json.dumps(leaves(json.loads(arguments), what), ensure_ascii=False)
        else:
            arguments = leaves(arguments, what)
        return {**call, "name": new(what), "arguments": arguments}

    marked = [
        {**m, "tool_calls": [called(c, f"message {n} ({m['role']}): a tool call")
                             for c in m["tool_calls"]]} if m.get("tool_calls") else dict(m)
        for n, m in enumerate(messages, start=1)
    ]  # fmt: skip
    named = None if tools is None else [_named(tool, new("the tools")) for tool in tools]
    return marked, named, marks


def shape_of(messages: Sequence[Message], tools: list[Any] | None, reasoning_key: str) -> Hashable:
    """Return a key that is equal for chats which differ only in what marks would stand for."""
    parts: list[Hashable] = []
    for message in messages:
        content = message.get("content")
        blank = content if not isinstance(content, str) or not content.strip() else "x"
        if len(message) == 2:
            parts.append((message["role"], blank))
            continue
        rest = {
            key: value
            for key, value in message.items()
            if key not in ("role", "content", reasoning_key)
        }
        thought = message.get(reasoning_key)
        thought = "x" if isinstance(thought, str) and thought.strip() else thought
        parts.append((message["role"], blank, thought, json.dumps(rest)))
    return (*parts, None if tools is None else json.dumps(tools))


def _named(tool: Any, mark: str) -> Any:
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        return {**tool, "function": {**tool["function"], "name": mark}}
    return {**tool, "name": mark} if isinstance(tool, dict) else mark


def _mark(number: int, kind: str = "A") -> str:
    # Letters only, so that no template treats it as markup; upper case, so that one that turns
    # text into upper case keeps it; of equal ends, so that none is the beginning of another.
    digits = "".join(chr(ord("A") + int(digit)) for digit in str(number))
    return f"QXPROBE{kind}{digits}ZJWVKQ"
