"""Validation errors in the user's words: dotted field, what was found, what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.fields import Leaf, leaves, suggestion
from pipeline.config.schema import BrokenRulesError, Settings
from pipeline.errors import ConfigError

__all__ = ["describe_errors", "validated"]

SettingsT = TypeVar("SettingsT", bound=Settings)


def validated(model: type[SettingsT], values: Mapping[str, Any]) -> SettingsT:
    """Return settings of these values.

    Raises:
        ConfigError: with all mistakes.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(mistakes=describe_errors(error, list(leaves(model)))) from None


def describe_errors(
    error: ValidationError, all_leaves: list[Leaf], others: Mapping[str, str] | None = None
) -> list[str]:
    """Return one line per mistake, without pydantic's terms.

    Args:
        error: pydantic's.
        all_leaves: of the settings.
        others: names and sections of other commands' fields, with the command.
    """
    known = [leaf.dotted for leaf in all_leaves] + [leaf.flag for leaf in all_leaves if leaf.flag]
    sections = sorted({".".join(leaf.path[:n]) for leaf in all_leaves for n in range(1, 9)})
    lines: dict[str, None] = {}
    for detail in error.errors():
        broken = (detail.get("ctx") or {}).get("error")
        several = broken.lines if isinstance(broken, BrokenRulesError) else (None,)
        for text in several:
            lines.setdefault(_line(detail, all_leaves, known, sections, others or {}, text))
    return list(lines)


def _line(
    detail: ErrorDetails,
    all_leaves: list[Leaf],
    known: list[str],
    sections: list[str],
    others: Mapping[str, str],
    text: str | None,
) -> str:
    location = [str(part) for part in detail["loc"]]
    leaf = next(
        (leaf for leaf in all_leaves if tuple(location[: len(leaf.path)]) == leaf.path), None
    )
    name = leaf.dotted if leaf else ".".join(location)
    found = _short(detail["input"])
    context: dict[str, Any] = detail.get("ctx") or {}
    match detail["type"]:
        case "extra_forbidden":
            name = ".".join(location)
            place = others.get(name) or (location[0] not in sections and others.get(location[0]))
            if place:
                return f"{name}: unknown field here; it belongs to {place}"
            return f"{name}: unknown field{suggestion(name, known + sections)}"
        case "missing":
            return f"{name}: required, but not given"
        case "value_error":
            text = str(context.get("error", detail["msg"])) if text is None else text
            if f"{name}.{text.partition(':')[0]}" in known:  # of a section: its own field's name
                return f"{name}.{text}"
            # A section's validator names the full field already.
            return text if not name or text.startswith(f"{name}.") else f"{name}: {text}"
        case "invalid_key":
            return f"{name}: found the key {found}, expected a text"
        case "model_type" | "model_attributes_type":
            return f"{name}: found {found}, expected a mapping"
        case _:
            expected = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            if leaf is not None and detail["type"].endswith(("_parsing", "_type")):
                expected = leaf.kind
            return f"{name}: found {found}, expected {expected}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
