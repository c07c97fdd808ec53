"""The text of a message and its reasoning, out of the shapes that data gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.corpus.sources.rows import BadRow
from pipeline.corpus.sources.unfit import described, kind_of_fault

__all__ = ["REASONING_KEYS", "read_content", "refuse_media", "take_reasoning"]

_TEXT_TYPES = (None, "text", "input_text", "output_text")
_THOUGHT_TYPES = ("thinking", "reasoning")
_THOUGHT_KEYS = ("thinking", "text", "reasoning")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Of a message, in data and in chat templates; ours is the first."""
_MEDIA = ("image", "video", "audio", "file", "input_image", "input_audio", "input_file")
_ONLY_TEXT = "text only: this pipeline distills language models without images"


def read_content(content: object, place: str, role: str) -> tuple[str, str]:
    """Return the text and the reasoning that a message's content holds, both empty if null.

    Raises:
        BadRow: a part that is not text or carries anything else, or reasoning after text.
    """
    if content is None:
        return "", ""
    if isinstance(content, str):
        return content, ""
    if role == "tool" and isinstance(content, Mapping):
        return _as_json(content, place), ""
    if not isinstance(content, (list, tuple)):
        raise BadRow(
            kind_of_fault(content, "no text"),
            f"{place}: the content is {described(content)}",
            expected="text or a list of parts",
        )
    return _read_parts(content, place)


def refuse_media(columns: Mapping[str, Any], place: str) -> None:
    """Refuse columns or keys that hold images, videos or audio.

    Raises:
        BadRow: one of them is not empty.
    """
    for kind in ("image", "video", "audio"):
        for name in (kind, f"{kind}s"):
            if columns.get(name):
                raise BadRow("no text", f"{place}: has {name!r}", expected=_ONLY_TEXT)


def take_reasoning(message: dict[str, Any], from_parts: str, place: str) -> str:
    """Remove the keys of reasoning from a message; return it, or that of its content's parts.

    Raises:
        BadRow: reasoning that is not text, or two that differ.
    """
    found = {"content": from_parts} if from_parts else {}
    for key in REASONING_KEYS:
        value = message.pop(key, None)
        if value is not None and not isinstance(value, str):
            raise BadRow("no text", f"{place}: {key!r} is {described(value)}", expected="text")
        if value:
            found[key] = value
    if len(set(found.values())) > 1:
        raise BadRow(
            "contradicting reasoning",
            f"{place}: the reasoning in {' and '.join(map(repr, found))} differs",
            expected="one reasoning",
        )
    return next(iter(found.values()), "")


def _read_parts(parts: list[Any] | tuple[Any, ...], place: str) -> tuple[str, str]:
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _THOUGHT_TYPES:
            if any(texts):
                raise BadRow(
                    "reasoning after text",
                    f"{place}: reasoning follows text of the same message",
                    expected="reasoning before the text",
                    do="make the parts messages of their own",
                )
            thoughts.append(_thought(part, place))
        else:
            texts.append(_part_text(part, place))
    return "".join(texts), "".join(thoughts)


def _part_text(part: object, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else described(part)
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind not in _TEXT_TYPES or not isinstance(text, str):
        raise BadRow("no text", f"{place}: a content part of type {kind!r}", expected=_ONLY_TEXT)
    assert isinstance(part, Mapping)
    carried = next((key for key, value in part.items() if value and _is_media(key)), None)
    if carried is not None:
        raise BadRow(
            "no text", f"{place}: a content part that carries {carried!r}", expected=_ONLY_TEXT
        )
    return text


def _is_media(key: object) -> bool:
    return isinstance(key, str) and key.startswith(_MEDIA)


def _thought(part: Mapping[str, Any], place: str) -> str:
    for key in _THOUGHT_KEYS:
        value = part.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, (list, tuple)):
            return "".join(_part_text(item, place) for item in value)
    raise BadRow(
        "no text",
        f"{place}: a content part of type {part.get('type')!r} without its text",
        expected=f"one of {', '.join(_THOUGHT_KEYS)}",
    )


def _as_json(content: Mapping[str, Any], place: str) -> str:
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRow(
            "not JSON data",
            f"{place}: the content is an object that JSON cannot hold ({error})",
            expected="text, or an object of JSON",
        ) from None
