"""The leaves of a settings tree: dotted names, short names, types, help and suggestions."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

__all__ = ["Leaf", "leaves", "suggestion"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value of the configuration that a file or a flag can set."""

    path: tuple[str, ...]
    annotation: Any
    default: Any
    required: bool
    help: str
    flag: str | None
    """Second, short name (that of the public sample), or None."""

    @property
    def dotted(self) -> str:
        """The name used in messages and on the command line, as in `teacher.model`."""
        return ".".join(self.path)

    @property
    def is_bool(self) -> bool:
        """Whether the flag needs no value (`--bf16`) and can be negated (`--no-bf16`)."""
        return bool in _members(self.annotation)

    @property
    def takes_text(self) -> bool:
        """Whether the flag's value is kept as typed instead of read as YAML."""
        members = _members(self.annotation)
        return str in members and not ({int, float, bool} & set(members))

    @property
    def takes_none(self) -> bool:
        """Whether `none` means no value, not a choice or a text of that name."""
        return type(None) in _members(self.annotation)

    @property
    def is_list(self) -> bool:
        """Whether the flag's value is a list: `[a, b]` or `a,b`."""
        return any(get_origin(member) in (list, tuple) for member in _members(self.annotation))

    @property
    def kind(self) -> str:
        """The type as `--help` shows it."""
        return " | ".join(_name(member) for member in _members(self.annotation))


def leaves(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Yield the leaves of `model`, depth first, in the order of declaration."""
    for name, info in model.model_fields.items():
        nested = info.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from leaves(nested, (*prefix, name))
        else:
            yield _leaf((*prefix, name), info)


def suggestion(name: str, known: list[str]) -> str:
    """Return "; did you mean X" for the nearest known name, or an empty string.

    The last part of dotted names counts as well: `teacher.modle` and `modle` both find
    `teacher.model`.
    """
    wanted = name.replace("-", "_").lower()
    by_key = {item.lower(): item for item in known}
    for item in known:
        by_key.setdefault(item.rsplit(".", 1)[-1].lower(), item)
    close = difflib.get_close_matches(wanted, list(by_key), n=1, cutoff=0.6)
    if not close and "." in wanted:
        close = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], list(by_key), n=1, cutoff=0.6)
    return f"; did you mean {by_key[close[0]]}?" if close else ""


def _leaf(path: tuple[str, ...], info: FieldInfo) -> Leaf:
    extra = info.json_schema_extra
    flag = extra.get("flag") if isinstance(extra, dict) else None
    return Leaf(
        path=path,
        annotation=info.annotation,
        default=None if info.is_required() else info.get_default(call_default_factory=True),
        required=info.is_required(),
        help=info.description or "",
        flag=str(flag) if flag else None,
    )


def _members(annotation: Any) -> tuple[Any, ...]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return tuple(m for arg in get_args(annotation) for m in _members(arg))
    if origin is Literal:
        return get_args(annotation)
    return (annotation,)


def _name(member: Any) -> str:
    if member is type(None):
        return "none"
    if isinstance(member, type) and get_origin(member) is None:
        return {"str": "text", "int": "integer", "float": "number", "bool": "true/false"}.get(
            member.__name__, member.__name__
        )
    if get_origin(member) is not None:
        return "list" if get_origin(member) in (list, tuple) else "mapping"
    return str(member)
