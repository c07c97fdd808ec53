"""The base of every settings class, and the YAML and fingerprint of a configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.config.secrets import PLAIN_ADDRESS, has_secret

__all__ = ["BrokenRulesError", "Settings", "dump_yaml", "fingerprint", "option", "rule"]

_MARK = "_is_rule"


class Settings(BaseModel):
    """Frozen; unknown keys are mistakes; each field's description is its help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="after")
    def _keep_rules(self) -> Self:
        rules = [
            value
            for owner in reversed(type(self).__mro__)
            for value in vars(owner).values()
            if getattr(value, _MARK, False)
        ]
        lines = [
            f"{name}: found an address with a password or a key, expected {PLAIN_ADDRESS}"
            for name in type(self).model_fields
            if any(map(has_secret, _texts(getattr(self, name))))
        ]
        lines += [line for kept in rules for line in kept(self)]
        if lines:
            raise BrokenRulesError(lines)
        return self


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of a field's value, those in lists and mappings too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


class BrokenRulesError(ValueError):
    """What fields say that cannot go together, each in a line of its own."""

    def __init__(self, lines: Sequence[str]) -> None:
        """Keep the lines."""
        super().__init__("; ".join(lines))
        self.lines = tuple(lines)


def rule(method: Callable[[Any], Iterator[str]]) -> Callable[[Any], Iterator[str]]:
    """Mark a method of a settings class that yields a line for each mistake across its fields.

    All rules are asked, where pydantic's own validators stop at the first that raises.
    """
    setattr(method, _MARK, True)
    return method


def option(default: Any, help: str, *, flag: str | None = None, **constraints: Any) -> Any:
    """Declare one settings field.

    Args:
        default: the value without file and flag; `...` makes the field required.
        help: the text of `--help`, with the unit of a number.
        flag: a second, short name, accepted as `--flag` and as a top-level key of the file.
        constraints: pydantic's (`ge`, `gt`, `le`, `lt`, `pattern`, `min_length`, ...).
    """
    extra: dict[str, Any] | None = {"flag": flag} if flag else None
    if default is ...:
        return Field(description=help, json_schema_extra=extra, **constraints)
    return Field(default=default, description=help, json_schema_extra=extra, **constraints)


def dump_yaml(settings: Settings, *, without: Sequence[str] = ()) -> str:
    """Render the resolved configuration as `--config` accepts it, without some sections."""
    data = settings.model_dump(mode="json", exclude=set(without))
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes texts with unusual line breaks, which YAML would fold to spaces."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if any(mark in text for mark in "\r\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def fingerprint(data: object) -> str:
    """Return the SHA-256 (hex) of `data` as canonical JSON: sorted keys, no white space."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
