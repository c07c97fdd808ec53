"""Whether what was read of a row is Unicode and what JSON can hold; repairs, and their count."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.corpus.chat.conversation import Conversation, Document, Message
from pipeline.corpus.sources.rows import BadRow
from pipeline.corpus.sources.unfit import described, is_unicode, kind_of_fault

__all__ = ["Soundness"]

_HALF = re.compile("[\ud800-\udfff]")
_UNREAD = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, bytes)
_TEMPLATES_KEYS = ("role", "content", "name", "tool_call_id", "tool_calls", "reasoning_content")
_NAME = re.compile(r"\w+")


@dataclass(slots=True)
class Soundness:
    """The check of all that is used of a source's rows, and what it counted."""

    replace: bool = False
    """Whether U+FFFD takes the place of what is not Unicode; else its row is bad."""
    replaced: int = 0
    """Texts in which that happened."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was left out without harm to the text, with the number of rows."""

    def checked(self, item: Conversation | Document, place: str) -> Conversation | Document:
        """Return the item as it is, or repaired.

        Raises:
            BadRow: text that is not Unicode, or a value that JSON cannot hold.
        """
        if isinstance(item, Document):
            if _is_sound(item.text):
                return item
            return Document(self._repaired(item.text, place, "the text"))
        if _is_sound(item.messages) and (item.tools is None or _is_sound(item.tools)):
            return item
        messages = [
            self._message(message, f"{place}, message {number}")
            for number, message in enumerate(item.messages, start=1)
        ]
        tools = None if item.tools is None else self._repaired(item.tools, place, "tools")
        prefix = _HALF.sub("\ufffd", item.answer_prefix)  # the beginning of a checked content
        return dataclasses.replace(item, messages=messages, tools=tools, answer_prefix=prefix)

    def reset(self) -> None:
        """Begin to count anew."""
        self.replaced = 0
        self.notes.clear()

    def _message(self, message: Message, place: str) -> Message:
        kept = {}
        for key, value in message.items():
            if key not in _TEMPLATES_KEYS and isinstance(value, _UNREAD):
                # Data about the message, like the time it was sent: no part of its text.
                self.notes[f"{key!r} of a message is {described(value)}: left out"] += 1
                continue
            kept[str(self._repaired(key, place, "a key"))] = self._repaired(value, place, key)
        return kept

    def _repaired(self, value: Any, place: str, where: str) -> Any:
        if _is_sound(value):
            return value
        if isinstance(value, str):
            return self._repaired_text(value, place, where)
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {
                self._repaired(key, place, f"a key of {where}"): self._repaired(
                    item, place, f"{where}.{key}" if _NAME.fullmatch(key) else f"{where}[{key!r}]"
                )
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [
                self._repaired(item, place, f"{where}[{number}]")
                for number, item in enumerate(value)
            ]
        what = repr(value) if isinstance(value, float) else described(value)
        raise BadRow(
            kind_of_fault(value, "not JSON data"),
            f"{place}, {where}: holds {what}",
            expected="what JSON can hold: text, numbers, true, false, null, lists and objects",
        )

    def _repaired_text(self, text: str, place: str, where: str) -> str:
        if self.replace:
            self.replaced += 1
            return _HALF.sub("\ufffd", text)
        half = _HALF.search(text)
        assert half is not None
        raise BadRow(
            "not Unicode",
            f"{place}, {where}: character {half.start() + 1} is half of a surrogate pair "
            f"(\\u{ord(half[0]):x})",
            expected="valid Unicode",
            do="repair the text, or set --corpus.invalid_unicode replace",
        )


def _is_sound(value: Any) -> bool:
    kind = type(value)
    if kind is str:
        return value.isascii() or is_unicode(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str or not (key.isascii() or is_unicode(key)):
                return False
            # Most are short messages: a call for each text would double the cost.
            if type(item) is str:
                if not (item.isascii() or is_unicode(item)):
                    return False
            elif not _is_sound(item):
                return False
        return True
    if kind is list:
        return all(map(_is_sound, value))
    if value is None or kind is bool or kind is int:
        return True
    return kind is float and math.isfinite(value)
