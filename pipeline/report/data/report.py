"""The record of a report: everything the page shows, to JSON and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import ConfigError
from pipeline.report.data.cache import CacheFacts
from pipeline.report.data.fields import STRICT
from pipeline.report.data.measures import Difference, Row
from pipeline.report.data.runs import (
    Command,
    Curve,
    Generation,
    Passage,
    SettingDifference,
    Speed,
)
from pipeline.report.data.sweep import SweepFacts

__all__ = ["Report"]

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the page shows. What is empty has no section."""

    __pydantic_config__ = STRICT

    title: str
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...] = ()
    curves: tuple[Curve, ...] = ()
    cache: CacheFacts | None = None
    passages: tuple[Passage, ...] = ()
    generations: tuple[Generation, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    """The resolved YAML of each stage, by the stage's name."""
    environment: dict[str, Any] = field(default_factory=dict)
    commands: tuple[Command, ...] = ()
    notes: tuple[str, ...] = ()
    sweep: SweepFacts | None = None
    speeds: tuple[Speed, ...] = ()
    setting_differences: tuple[SettingDifference, ...] = ()
    summary: str = ""
    """The one-sentence answer; computed from the numbers if empty, which is the honest way."""

    def to_json(self) -> dict[str, Any]:
        """Return plain mappings, lists, text and finite numbers."""
        # A value of another type than its field's is a mistake of ours and raises.
        data = _adapter().dump_python(self, mode="json", warnings="error")
        return {"format": _FORMAT, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """Return the report that `to_json` gave.

        Raises:
            ConfigError: the data is not a report, or of a newer format; the place is named.
        """
        fields = dict(data)
        found = fields.pop("format", None)
        if found != _FORMAT:
            raise ConfigError(
                f"report.json of format {found!r}",
                expected=f"format {_FORMAT}",
                do="write the report again with this version of the pipeline",
            )
        try:
            return _adapter().validate_python(fields)
        except ValidationError as error:
            raise _told(error) from None


@cache
def _adapter() -> TypeAdapter[Report]:
    return TypeAdapter(Report)


def _told(error: ValidationError) -> ConfigError:
    """Return the first mistake by its place; the others are often its echoes."""
    first = error.errors(include_url=False)[0]
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
    place = "report" + "".join(steps)
    if first["type"] == "missing":
        return ConfigError(f"{place}: missing", expected="a complete report")
    found = repr(first["input"])
    found = found if len(found) <= 60 else found[:57] + "..."
    if first["type"] == "unexpected_keyword_argument":
        return ConfigError(f"{place}: unknown, with {found}", expected="members of a report only")
    expected = first["msg"].removeprefix("Input should be ").replace("a valid ", "a ")
    expected = expected.replace("a integer", "an integer")
    return ConfigError(f"{place}: found {found}", expected=expected)
