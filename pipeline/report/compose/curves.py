"""What a run logged, as curves and as its speed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

from pipeline.observe.metrics import MetricRecord, is_timing
from pipeline.report.compose.runs import Run, RunFolder
from pipeline.report.data.runs import Curve, Speed
from pipeline.report.text.metrics import LOGGED

__all__ = ["curves_of", "speeds_of"]


def curves_of(
    records: Iterable[MetricRecord],
    folder: RunFolder,
    *,
    names: Mapping[str, tuple[str, str]] = LOGGED,
) -> tuple[Curve, ...]:
    """Return the curves of one run.

    Args:
        records: what it logged.
        folder: the run's name in the legend, its role and its place, which decide the style.
        names: (heading, unit) by the metric's key, in the order of the charts; a key that was not
            logged gives no curve.
    """
    points: dict[str, list[tuple[int, float]]] = {key: [] for key in names}
    for record in records:
        for key in names:
            if key in record.values:
                points[key].append((record.step, record.values[key]))
    return tuple(
        Curve(
            name=heading,
            points=tuple(points[key]),
            series=folder.name,
            kind=folder.kind,
            unit=unit,
            group="speed" if is_timing(key) else "learning",
            rank=folder.rank,
        )
        for key, (heading, unit) in names.items()
        if points[key]
    )


def speeds_of(runs: Iterable[Run]) -> tuple[Speed, ...]:
    """Return how fast each run was; one that logged no step has no speed."""
    return tuple(speed for run in runs if (speed := _speed(run)) is not None)


def _speed(run: Run) -> Speed | None:
    logged = [r.values for r in run.metrics if r.values.get("throughput/tokens_per_s", 0.0) > 0]
    if not logged:
        return None
    tokens = [values.get("train/tokens", 0.0) for values in logged]
    rates = [values["throughput/tokens_per_s"] for values in logged]
    seconds = sum(count / rate for count, rate in zip(tokens, rates, strict=True))
    waited = sum(values.get("data/wait_s", 0.0) for values in logged)
    peaks = [values["memory/peak_gib"] for values in logged if "memory/peak_gib" in values]
    return Speed(
        name=run.folder.name,
        steps=len(logged),
        tokens=round(sum(tokens)),
        tokens_per_s=statistics.median(rates),
        wait_share=waited / seconds if seconds else 0.0,
        peak_memory_gib=max(peaks) if peaks else None,
        seconds=run.folder.seconds,
        rank=run.folder.rank,
    )
