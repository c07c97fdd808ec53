"""From the sweep file's space to points: fields found, values checked, combinations listed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.config import Settings
from pipeline.config.fields import Leaf, leaves, names_of, suggestion
from pipeline.config.mistakes import describe_errors
from pipeline.data.mixture.settings import caches_named
from pipeline.errors import ConfigError
from pipeline.sweeps.file import SearchSettings, SweepFile

__all__ = ["Point", "Range", "Space", "describe_values", "short_names", "value_text"]

_OWN = {
    "output.output_dir": "each run has a folder of its own below the sweep's",
    "train.resume_from_checkpoint": "a sweep always resumes what it has begun",
    "output.hub_location": "runs of a sweep are not pushed; push the best one afterwards",
    "output.save_location": "runs of a sweep are not pushed; push the best one afterwards",
}
_CACHES = "cache_dir"
_SAME = ("observe.", "output.")
_RANGE_KEYS = {"low", "high", "log", "step"}


@dataclass(frozen=True, slots=True)
class Point:
    """One run's settings, and which of them the sweep changed."""

    values: dict[str, Any]
    """By dotted field, as the schema reads them: `1` and `1.0` of a number are the same value."""
    settings: Settings

    @property
    def label(self) -> str:
        """The changed values as people read them, in the file's order."""
        return describe_values(self.values)


@dataclass(frozen=True, slots=True)
class Range:
    """An interval that a search draws from."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False


class Space:
    """The base with its overrides, and the values that a sweep may put into it.

    Args:
        base: settings that every point starts from, the overrides in them.
        file: the sweep file.
    """

    def __init__(self, base: Settings, file: SweepFile) -> None:
        """Check every field and value by itself; what is wrong is in `mistakes`."""
        self.base = base
        self._model = type(base)
        self._leaves = list(leaves(self._model))
        self._names = names_of(self._leaves)
        self._data = base.model_dump(mode="python")
        self.mistakes: list[str] = []
        """What was found wrong so far; rejected values are not in the points."""
        if file.overrides:
            self._override(file.overrides)
        self.axes: dict[str, list[Any] | Range] = {}
        """What a grid or a search varies, by dotted field."""
        self._listed: list[dict[str, Any]] = []
        if file.grid is not None:
            self._read_grid(file.grid)
        elif file.points is not None:
            self._read_points(file.points)
        else:
            assert file.search is not None
            self._read_search(file.search, file.objective)

    @property
    def fields(self) -> tuple[str, ...]:
        """The dotted fields that vary, in the order of the file."""
        listed = dict.fromkeys(name for values in self._listed for name in values)
        return tuple(listed) or tuple(self.axes)

    def points(self) -> list[Point]:
        """Return the points of a grid or list; values that do not go together are noted."""
        return self._points(self._listed)

    def corners(self) -> list[Point]:
        """Return one point for each choice and range end of a search, the rest at its first.

        What the cache rejects of these it would reject in the middle of the search.
        """
        ends = {name: _ends(axis) for name, axis in self.axes.items()}
        if not all(ends.values()):
            return []
        first = {name: values[0] for name, values in ends.items()}
        listed = [{**first, name: value} for name, values in ends.items() for value in values]
        unique = {json.dumps(values, sort_keys=True, default=str): values for values in listed}
        return self._points(list(unique.values()))

    def _points(self, listed: Sequence[Mapping[str, Any]]) -> list[Point]:
        found: dict[str, Point] = {}
        for values in listed:
            try:
                point = self.point(values)
            except ConfigError as error:
                self.mistakes += [f"{describe_values(values)}: {line}" for line in error.mistakes]
                continue
            key = json.dumps(point.values, sort_keys=True, default=str)
            if key in found:
                self.mistakes.append(f"{point.label}: this point is listed twice")
            found[key] = point
        points = list(found.values())
        self.mistakes += _other_caches(points)
        return points

    def point(self, values: Mapping[str, Any]) -> Point:
        """Return the base with these values.

        Raises:
            ConfigError: the schema rejects them.
        """
        settings = self._validated(values)
        canonical = settings.model_dump(mode="json")
        read = {name: _get(canonical, name) for name in values}
        return Point(read, settings)

    def _validated(self, values: Mapping[str, Any]) -> Settings:
        try:
            return self._model.model_validate(_put(self._data, values))
        except ValidationError as error:
            raise ConfigError(mistakes=describe_errors(error, self._leaves)) from None

    def _override(self, overrides: Mapping[str, Any]) -> None:
        values = {}
        for name, value in self._flat(overrides):
            dotted = self._find(name, "overrides", sweepable=False)
            if dotted is not None:
                values[dotted] = value
        try:
            self.base = self._validated(values)
        except ConfigError as error:
            self.mistakes += [f"overrides: {line}" for line in error.mistakes]
        else:
            self._data = self.base.model_dump(mode="python")

    def _flat(self, data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Yield dotted names and values of nested sections; a field's own value stays as it is."""
        known = {leaf.dotted for leaf in self._leaves}
        for key, value in data.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping) and name not in known:
                yield from self._flat(value, f"{name}.")
            else:
                yield name, value

    def _find(self, name: str, where: str, *, sweepable: bool = True) -> str | None:
        """Return the dotted name of a field, or note why it is none that can vary."""
        key = str(name).replace("-", "_")
        leaf = self._names.get(key)
        if leaf is None:
            hint = suggestion(key, list(self._names))
            self.mistakes.append(f"{where}: {name}: unknown field{hint}")
            return None
        if leaf.dotted == _CACHES and not sweepable:
            self.mistakes.append(
                f"{where}: {leaf.dotted}: cannot be set here; the sweep file has a key of that name"
            )
            return None
        if leaf.dotted in _OWN:
            self.mistakes.append(f"{where}: {leaf.dotted}: cannot be set here; {_OWN[leaf.dotted]}")
            return None
        if sweepable and leaf.dotted.startswith(_SAME):
            self.mistakes.append(
                f"{where}: {leaf.dotted}: found in the space, expected a field that changes the "
                "student"
            )
            return None
        return leaf.dotted

    def _accepted(self, dotted: str, values: Sequence[Any], where: str) -> list[Any]:
        """Return the values that the field itself takes, whatever the others are; note the rest."""
        path = tuple(dotted.split("."))
        good = []
        for value in values:
            try:
                self._model.model_validate(_put(self._data, {dotted: value}))
            except ValidationError as error:
                # A rule over several fields reports its section, not the field: the other fields
                # may vary as well, so that is judged of the whole point.
                if any(detail["loc"][: len(path)] == path for detail in error.errors()):
                    lines = describe_errors(error, self._leaves)
                    own = [line for line in lines if line.startswith(f"{dotted}:")]
                    self.mistakes += [f"{where}: {line}" for line in own]
                    continue
            good.append(value)
        return good

    def _read_grid(self, grid: Mapping[str, list[Any]]) -> None:
        if not grid:
            self.mistakes.append("grid: found no field, expected at least one with its values")
        for name, values in grid.items():
            dotted = self._find(name, "grid")
            if dotted is None:
                continue
            if dotted in self.axes:
                self.mistakes.append(f"grid: {dotted}: given twice, by both of its names")
            if not values:
                self.mistakes.append(f"grid: {dotted}: found an empty list, expected values")
            self.axes[dotted] = self._accepted(dotted, values, "grid")
        names, lists = list(self.axes), [_ends(axis) for axis in self.axes.values()]
        if names:
            self._listed = [
                dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*lists)
            ]

    def _read_points(self, points: Sequence[Mapping[str, Any]]) -> None:
        if not points:
            self.mistakes.append("points: found an empty list, expected at least one point")
        for number, point in enumerate(points, start=1):
            where = f"points, number {number}"
            if not point:
                self.mistakes.append(f"{where}: found no field, expected at least one")
            values: dict[str, Any] = {}
            for name, value in self._flat(point):
                dotted = self._find(name, where)
                if dotted is not None:
                    values |= dict.fromkeys([dotted], value)
            good = [name for name in values if self._accepted(name, [values[name]], where)]
            if values and len(good) == len(values):
                self._listed.append(values)
        # Every point says all fields that vary anywhere, so that the table has no holes.
        base = self.base.model_dump(mode="json")
        fields = tuple(dict.fromkeys(name for values in self._listed for name in values))
        self._listed = [
            {name: values.get(name, _get(base, name)) for name in fields} for values in self._listed
        ]

    def _read_search(self, search: SearchSettings, objective: str) -> None:
        if not search.space:
            self.mistakes.append("search.space: found no field, expected at least one")
        for name, axis in search.space.items():
            dotted = self._find(name, "search.space")
            if dotted is None:
                continue
            where = f"search.space: {dotted}"
            leaf = next(leaf for leaf in self._leaves if leaf.dotted == dotted)
            if isinstance(axis, list):
                if not axis:
                    self.mistakes.append(f"{where}: found an empty list, expected choices")
                self.axes[dotted] = self._accepted(dotted, axis, "search.space")
                continue
            interval = _read_range(axis, leaf, where, self.mistakes)
            if interval is not None and self._accepted(dotted, _ends(interval), "search.space"):
                self.axes[dotted] = interval
        eval_steps = getattr(getattr(self.base, "train", None), "eval_steps", None)
        if search.pruner != "none" and objective.startswith("heldout/") and not eval_steps:
            self.mistakes.append(
                f"search.pruner: found {search.pruner} without train.eval_steps; expected "
                "`overrides: {train.eval_steps: N}`, for without evaluations in the middle there "
                "is nothing to judge a run by"
            )


def describe_values(values: Mapping[str, Any]) -> str:
    """Return values as people read them: `temperature 2, alpha 0.5`."""
    names = short_names(tuple(values))
    return ", ".join(f"{names[name]} {value_text(value)}" for name, value in values.items())


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Return the last part of each dotted name, and the whole where two share that part."""
    lasts = [name.rsplit(".", 1)[-1] for name in fields]
    return {
        name: last if lasts.count(last) == 1 else name
        for name, last in zip(fields, lasts, strict=True)
    }


def value_text(value: Any) -> str:
    """Return one value as short text that still tells it from any other."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, (list, tuple)):
        return " ".join(value_text(item) for item in value) or "(empty)"
    if isinstance(value, dict) and value.keys() == {"url", "weight", "tag"}:  # of a mixture
        return f"{value_text(float(value['weight']))} {value['tag']}"
    return str(value)


def _read_range(axis: Any, leaf: Leaf, where: str, mistakes: list[str]) -> Range | None:
    expected = "expected a list of choices, or a mapping with low and high"
    if not isinstance(axis, dict) or not {"low", "high"} <= set(axis):
        mistakes.append(f"{where}: found {axis!r}, {expected}")
        return None
    unknown = sorted(str(key) for key in set(axis) - _RANGE_KEYS)
    if unknown:
        hint = suggestion(unknown[0], sorted(_RANGE_KEYS))
        mistakes.append(f"{where}: unknown key {', '.join(unknown)}{hint}")
        return None
    members = leaf.kind.split(" | ")
    if "number" not in members and "integer" not in members:
        mistakes.append(f"{where}: found a range for {leaf.kind}, expected a list of choices")
        return None
    try:
        # YAML reads 1e-4 as text.
        low, high = float(axis["low"]), float(axis["high"])
        step = None if axis.get("step") is None else float(axis["step"])
    except (TypeError, ValueError):
        mistakes.append(f"{where}: found {axis!r}, expected numbers")
        return None
    log = axis.get("log", False)
    problem = ""
    if not isinstance(log, bool):
        problem = f"found log {log!r}, expected true or false"
    elif not low < high:
        problem = f"found low {low:g} and high {high:g}, expected low below high"
    elif log and low <= 0:
        problem = f"found low {low:g} with log, expected more than 0"
    elif log and step is not None:
        problem = "found both log and step, expected at most one"
    elif step is not None and step <= 0:
        problem = f"found step {step:g}, expected more than 0"
    if problem:
        mistakes.append(f"{where}: {problem}")
        return None
    return Range(low, high, log, step, integer="number" not in members)


def _other_caches(points: Sequence[Point]) -> list[str]:
    """Return a mistake for each point that reads other caches than the first, or in another order.

    Runs are compared over the same held-out rows, which are those of the caches.
    """
    read = [caches_named(getattr(point.settings, _CACHES, "")) for point in points]
    return [
        f"{point.label}: found other caches than in {points[0].label}, or in another order; "
        "expected the same ones, with other weights: runs are compared over their held-out rows"
        for point, named in zip(points, read, strict=True)
        if named != read[0]
    ]


def _ends(axis: list[Any] | Range) -> list[Any]:
    if isinstance(axis, Range):
        return [int(end) if axis.integer else end for end in (axis.low, axis.high)]
    return axis


def _get(data: Mapping[str, Any], dotted: str) -> Any:
    node: Any = data
    for part in dotted.split("."):
        node = node[part]
    return node


def _put(data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of nested settings with values at dotted names."""
    copied = _copied(data)
    for name, value in values.items():
        *parents, last = name.split(".")
        node = copied
        for part in parents:
            node = node[part]
        node[last] = value
    return copied


def _copied(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copied(value) if isinstance(value, Mapping) else value for key, value in data.items()
    }
