"""Tools and their calls in one shape, out of the shapes that data gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.corpus.sources.rows import BadRow
from pipeline.corpus.sources.unfit import JSON, described, kind_of_fault

__all__ = ["listed", "read_tools", "take_tool_calls"]

_NOT_JSON = "tool arguments are not JSON"
_CALL = "a function's name and arguments"


def listed(value: object, place: str, what: str) -> object:
    """Return a list where the value is one in disguise; other values as they are.

    A list may come as JSON text. Tables of the `datasets` library turn a sequence of objects
    into one object of equally long lists. Nothing, an empty text included, is an empty list.

    Raises:
        BadRow: text that is not JSON.
    """
    if isinstance(value, str):
        try:
            value = JSON.decode(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise BadRow(
                "not JSON", f"{place}: {what} is not JSON ({reason})", expected="a JSON list"
            ) from None
    if value is None:
        return []
    if isinstance(value, Mapping) and all(isinstance(items, list) for items in value.values()):
        if not value:
            return []
        lengths = {len(items) for items in value.values()}
        if len(lengths) == 1:
            rows = zip(*value.values(), strict=True)
            return [_without_nulls(zip(value, row, strict=True)) for row in rows]
    return value


def read_tools(value: object, place: str) -> list[Any] | None:
    """Return the descriptions of tools; None where there are none.

    Raises:
        BadRow: not a list of objects.
    """
    items = listed(value, place, "the column 'tools'")
    if not isinstance(items, (list, tuple)):
        raise BadRow(
            kind_of_fault(items, "no list of tools"),
            f"{place}: the column 'tools' holds {described(items)}",
            expected="a JSON list",
        )
    return [_object(item, place, "a tool") for item in items] or None


def take_tool_calls(message: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """Remove the calls from a message, and return them with their arguments as an object.

    `{"type": "function", "id": ..., "function": {"name": ..., "arguments": {...}}}`, whatever they
    came as: without `function`, with arguments as JSON text, or in the older key `function_call`.

    Raises:
        BadRow: a call without a name, or arguments that are not an object of JSON.
    """
    items = listed(message.pop("tool_calls", None), place, "'tool_calls'")
    if not isinstance(items, (list, tuple)):
        items = [items] if items else []
    if older := listed(message.pop("function_call", None), place, "'function_call'"):
        if items:
            raise BadRow(
                "two sets of tool calls",
                f"{place}: has both 'tool_calls' and 'function_call'",
                expected="one of them",
            )
        items = [older]
    return [_call(_object(item, place, "a tool call"), place) for item in items]


def _object(item: object, place: str, what: str) -> dict[str, Any]:
    if isinstance(item, str):
        try:
            item = JSON.decode(item)
        except (ValueError, RecursionError):
            raise BadRow(
                "not JSON", f"{place}: {what} is text that is not JSON", expected="an object"
            ) from None
    if not isinstance(item, Mapping):
        raise BadRow(
            kind_of_fault(item, "no object"),
            f"{place}: {what} is {described(item)}",
            expected="an object of JSON",
        )
    return dict(item)


def _call(call: dict[str, Any], place: str) -> dict[str, Any]:
    outer = _without_nulls(call.items())
    nested = isinstance(outer.get("function"), Mapping)
    inner = _without_nulls(outer.pop("function").items()) if nested else outer
    name = inner.pop("name", None)
    if not isinstance(name, str) or not name.strip():
        raise BadRow("a tool call without a name", f"{place}: {call!r:.120}", expected=_CALL)
    kind = outer.pop("type", "function")
    if kind != "function":
        raise BadRow(
            "an unknown tool call",
            f"{place}: a call of {name} of the type {kind!r:.60}",
            expected="calls of the type function",
        )
    key = "arguments" if "arguments" in inner or "parameters" not in inner else "parameters"
    arguments = _arguments(inner.pop(key, None), f"{place}, call of {name}")
    identity = {"id": outer.pop("id")} if "id" in outer else {}
    function = {**(inner if nested else {}), "name": name, "arguments": arguments}
    return {**outer, "type": "function", **identity, "function": function}


def _arguments(value: object, place: str) -> dict[str, Any]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        try:
            value = JSON.decode(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(
                _NOT_JSON, f"{place}: the arguments are text that is not JSON ({error})",
                expected="an object of JSON",
            ) from None  # fmt: skip
    if not isinstance(value, Mapping):
        raise BadRow(
            kind_of_fault(value, _NOT_JSON), f"{place}: the arguments are {described(value)}",
            expected="an object of JSON",
        )  # fmt: skip
    return dict(value)


def _without_nulls(items: Any) -> dict[str, Any]:
    return {str(key): value for key, value in items if value is not None}
