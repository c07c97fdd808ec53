"""Curves of a report from the metrics file that a run left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.observe.metrics import is_timing, read_metrics
from pipeline.report.data.records import Curve, Kind

__all__ = ["curves_from_metrics"]


def curves_from_metrics(
    path: str | Path,
    *,
    names: Mapping[str, tuple[str, str]],
    series: str,
    kind: Kind = "distilled",
    rank: int = 0,
) -> tuple[Curve, ...]:
    """Read the curves of one run.

    Args:
        path: a `metrics.jsonl`.
        names: (heading, unit) by the metric's key, in the order of the charts; a key that the
            file lacks gives no curve.
        series: the run's name in the legend.
        kind: the run's role, which decides colour and line style.
        rank: the run's place in a sweep, which decides them there.
    """
    points: dict[str, list[tuple[int, float]]] = {key: [] for key in names}
    for record in read_metrics(path):
        for key in names:
            if key in record.values:
                points[key].append((record.step, record.values[key]))
    return tuple(
        Curve(
            name=heading,
            points=tuple(points[key]),
            series=series,
            kind=kind,
            unit=unit,
            group="speed" if is_timing(key) else "learning",
            rank=rank,
        )
        for key, (heading, unit) in names.items()
        if points[key]
    )
