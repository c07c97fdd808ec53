"""The base of every settings class, and the YAML and fingerprint of a configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Settings", "dump_yaml", "fingerprint", "option"]


class Settings(BaseModel):
    """Frozen; unknown keys are mistakes; each field's description is its help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


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
