"""What a run logged, as curves and as its speed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Literal

from pipeline.observe.metrics import MetricRecord, is_timing
from pipeline.report.compose.runs import Run, RunFolder
from pipeline.report.data.runs import Curve, Speed
from pipeline.report.text.metrics import LOGGED

__all__ = ["curves_of", "shared_axis", "speeds_of", "started_alike"]

_TOKENS = "train/total_tokens"


def shared_axis(runs: Iterable[Run]) -> Literal["step", "tokens"]:
    """Return `tokens` where all runs logged how many they had trained on, else `step`."""
    known = [any(_TOKENS in record.values for record in run.metrics) for run in runs]
    return "tokens" if all(known) else "step"


def curves_of(
    records: Iterable[MetricRecord],
    folder: RunFolder,
    *,
    names: Mapping[str, tuple[str, str]] = LOGGED,
    over: Literal["step", "tokens"] = "step",
) -> tuple[Curve, ...]:
    """Return the curves of one run.

    Args:
        records: what it logged.
        folder: the run's name in the legend, its role and its place, which decide the style.
        names: (heading, unit) by the metric's key, in the order of the charts; a key that was not
            logged gives no curve.
        over: what the curves of learning are drawn over; the ones of speed are over steps. A
            record whose tokens are not known is left out.
    """
    records = list(records)
    tokens = {0: 0} | {
        record.step: round(record.values[_TOKENS]) for record in records if _TOKENS in record.values
    }
    curves = []
    for key, (heading, unit) in names.items():
        axis = "step" if is_timing(key) else over
        values = [(record.step, record.values[key]) for record in records if key in record.values]
        if axis == "tokens":
            values = [(tokens[step], value) for step, value in values if step in tokens]
        if values:
            curves.append(
                Curve(
                    name=heading,
                    points=tuple(values),
                    series=folder.name,
                    kind=folder.kind,
                    unit=unit,
                    group="speed" if is_timing(key) else "learning",
                    rank=folder.rank,
                    over=axis,
                )
            )
    return tuple(curves)


def started_alike(first: Run, other: Run) -> tuple[MetricRecord, ...]:
    """Return what `other` logged, and before it the start that it shares with `first`.

    A control and a student of dense targets train from the very weights of the distilled student
    and do not measure them again.
    """
    if other.folder.kind not in ("control", "dense"):
        return other.metrics
    own = {record.step for record in other.metrics}
    start = [record for record in first.metrics if record.step == 0 and 0 not in own]
    return (*start, *other.metrics)


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

    def known(key: str) -> list[float]:
        return [values[key] for values in logged if key in values]

    def median(key: str) -> float | None:
        return statistics.median(known(key)) if known(key) else None

    skipped = known("train/skipped_updates")
    return Speed(
        name=run.folder.name,
        steps=len(logged),
        tokens=round(sum(tokens)),
        tokens_per_s=statistics.median(rates),
        wait_share=waited / seconds if seconds else 0.0,
        peak_memory_gib=max(known("memory/peak_gib"), default=None),
        tokens_per_s_per_device=median("throughput/tokens_per_s_per_device"),
        mfu=median("throughput/mfu"),
        device_peak_gib=max(known("memory/device_peak_gib"), default=None),
        skipped_updates=round(max(skipped)) if skipped else None,
        seconds=run.folder.seconds,
        rank=run.folder.rank,
    )
