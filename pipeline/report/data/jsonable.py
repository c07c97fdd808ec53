"""Frozen dataclasses to plain JSON data and back, by their type hints."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pipeline.errors import ConfigError

__all__ = ["from_jsonable", "to_jsonable"]

T = TypeVar("T")


def to_jsonable(value: Any) -> Any:
    """Return `value` with dataclasses as mappings, tuples as lists, NaN and infinity as text.

    JSON has no NaN; as text (`"nan"`) the file stays valid and `float()` reads it back.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return {name: to_jsonable(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    # Numbers of numpy and torch; anything else is a mistake of ours and raises here.
    return to_jsonable(value.item())


def from_jsonable(kind: type[T], data: Any, *, where: str = "report") -> T:
    """Return the dataclass `kind` that `to_jsonable` turned into `data`.

    Raises:
        ConfigError: a field is unknown, missing or of another type; `where` it lies is named.
    """
    result: T = _read(kind, data, where)
    return result


def _read(hint: Any, data: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return data
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _read_dataclass(hint, data, where)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        (inner,) = [arg for arg in args if arg is not type(None)]
        return _read(inner, data, where)
    if origin is Literal:
        return _checked(data in args, data, data, f"one of {', '.join(map(repr, args))}", where)
    if origin is tuple:
        _checked(isinstance(data, (list, tuple)), None, data, "a list", where)
        if args[-1] is Ellipsis:
            return tuple(_read(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
        _checked(len(data) == len(args), None, data, f"{len(args)} items", where)
        return tuple(
            _read(arg, item, f"{where}[{i}]")
            for i, (arg, item) in enumerate(zip(args, data, strict=True))
        )
    if origin is dict:
        _checked(isinstance(data, dict), None, data, "a mapping", where)
        return {str(key): _read(args[1], item, f"{where}.{key}") for key, item in data.items()}
    return _read_scalar(hint, data, where)


def _read_scalar(hint: Any, data: Any, where: str) -> Any:
    if hint is float:
        is_number = isinstance(data, (int, float)) and not isinstance(data, bool)
        is_number = is_number or data in ("nan", "inf", "-inf")
        _checked(is_number, None, data, "a number", where)
        return float(data)
    if hint is int:
        is_integer = isinstance(data, int) and not isinstance(data, bool)
        return _checked(is_integer, data, data, "an integer", where)
    expected = {str: "text", bool: "true or false"}.get(hint, str(hint))
    return _checked(isinstance(data, hint), data, data, expected, where)


def _read_dataclass(kind: type[Any], data: Any, where: str) -> Any:
    _checked(isinstance(data, dict), None, data, "a mapping", where)
    hints = get_type_hints(kind)
    unknown = sorted(set(data) - set(hints))
    _checked(not unknown, None, unknown, f"fields of {kind.__name__} only", where)
    values = {name: _read(hints[name], item, f"{where}.{name}") for name, item in data.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}", expected=f"all fields of {kind.__name__}") from None


def _checked(ok: bool, value: Any, found: Any, expected: str, where: str) -> Any:
    if not ok:
        text = repr(found)
        text = text if len(text) <= 60 else text[:57] + "..."
        raise ConfigError(f"{where}: found {text}", expected=expected)
    return value
