"""The sweep's part of the page: its table, its charts by swept value, its key figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.amounts import format_duration
from pipeline.report.charts.styles import rank_style
from pipeline.report.charts.swept import value_scene
from pipeline.report.data.measures import Row
from pipeline.report.data.report import Report
from pipeline.report.data.runs import Speed
from pipeline.report.data.sweep import SweepFacts, SweepPoint
from pipeline.report.html.page_parts import Figure, Tile, figure
from pipeline.report.text.metrics import Metric, metric_decimals, shown_metrics, upper_first
from pipeline.report.text.numbers import format_measure
from pipeline.report.text.sweep_text import objective_metric, objective_text, verdict_text

__all__ = ["sweep_tiles", "sweep_view"]


@dataclass(frozen=True, slots=True)
class _Line:
    """One run in the table."""

    point: SweepPoint
    style: str
    values: tuple[str, ...]
    objective: tuple[str, str]
    """(value, "± error")."""
    to_best: str
    verdict: str
    others: tuple[tuple[str, str], ...]
    seconds: str


def sweep_view(report: Report) -> dict[str, Any] | None:
    """Return what the sweep's section shows; none where the report is of no sweep."""
    facts = report.sweep
    if facts is None:
        return None
    metric = objective_metric(facts)
    ranked = facts.ranked
    rows = {row.name: row for row in report.rows}
    others = [m for m in shown_metrics(report.rows) if m.key != metric.key]
    names = _field_names(facts.fields)
    return {
        "facts": facts,
        "metric": metric,
        "heading": upper_first(facts.label),
        "better": "higher is better" if facts.maximize else "lower is better",
        "fields": [names[field] for field in facts.fields],
        "others": others,
        "loss_varies": any(field.startswith("loss.") for field in facts.fields),
        "lines": [
            _line(point, facts, metric, others, rows.get(point.label), report) for point in ranked
        ],
        "references": [
            _reference(row, metric, others, report)
            for row in report.rows
            if row.kind in ("before", "teacher")
        ],
        "unfinished": [point for point in facts.points if not point.rank],
        "charts": _charts(facts, names),
        "legend": [(rank_style(point.rank), f"#{point.rank} {point.label}") for point in ranked],
    }


def sweep_tiles(facts: SweepFacts, speeds: Sequence[Speed]) -> list[Tile]:
    """Return the key figures of a sweep."""
    ranked = facts.ranked
    if not ranked:
        return []
    metric = objective_metric(facts)
    best = ranked[0]
    places = min(metric.decimals, 3)
    value = objective_text(best.objective, metric, decimals=places)
    if best.before is not None:
        start = objective_text(best.before, metric, decimals=places).removesuffix(metric.unit)
        tiles = [Tile(facts.label, f"{start.strip()} → {value}", "best run, before and after")]
    else:
        tiles = [Tile(facts.label, value, "of the best run")]
    noise = sum(point.verdict == "within noise" for point in ranked)
    worse = sum(point.verdict == "worse" for point in ranked)
    if noise + worse:
        tiles.append(
            Tile(
                "within noise of the best",
                f"{noise} of {len(ranked) - 1}",
                f"{worse} clearly worse",
            )
        )
    lost = len(facts.points) - len(ranked)
    note = f"{lost} without a result" if lost else "every run has a result"
    tiles.append(Tile("runs from one pass of the teacher", str(len(ranked)), note))
    spent = [speed.seconds for speed in speeds if speed.seconds is not None]
    if spent:
        per_run = f"{format_duration(sum(spent) / len(spent))} a run"
        tiles.append(Tile("time of all runs", format_duration(sum(spent)), per_run))
    return tiles


def _line(
    point: SweepPoint,
    facts: SweepFacts,
    metric: Metric,
    others: Sequence[Metric],
    row: Row | None,
    report: Report,
) -> _Line:
    measures = {} if row is None else row.metrics
    seconds = next((s.seconds for s in report.speeds if s.name == point.label), None)
    return _Line(
        point=point,
        style=rank_style(point.rank),
        values=tuple(point.values.get(field, "") for field in facts.fields),
        objective=format_measure(
            point.objective, metric, decimals=_decimals(metric, facts, report)
        ),
        to_best=verdict_text(point, metric),
        verdict=point.verdict,
        others=tuple(
            format_measure(measures.get(m.key), m, decimals=metric_decimals(m, report.rows))
            for m in others
        ),
        seconds=format_duration(seconds),
    )


def _reference(
    row: Row, metric: Metric, others: Sequence[Metric], report: Report
) -> dict[str, Any]:
    decimals = metric_decimals(metric, report.rows)
    return {
        "row": row,
        "objective": format_measure(row.metrics.get(metric.key), metric, decimals=decimals),
        "others": [
            format_measure(row.metrics.get(m.key), m, decimals=metric_decimals(m, report.rows))
            for m in others
        ],
    }


def _decimals(metric: Metric, facts: SweepFacts, report: Report) -> int:
    measured = any(metric.key in row.metrics for row in report.rows)
    return metric_decimals(metric, report.rows) if measured else metric.decimals


def _charts(facts: SweepFacts, names: dict[str, str]) -> list[Figure]:
    if not facts.ranked:
        return []
    several = len(facts.fields) > 1
    note = "runs that share every other value are joined" if several else "each point is one run"
    return [
        figure(value_scene(facts, field, names[field]), identity=f"swept-{number}", note=note)
        for number, field in enumerate(facts.fields)
    ]


def _field_names(fields: Sequence[str]) -> dict[str, str]:
    lasts = [field.rsplit(".", 1)[-1] for field in fields]
    return {
        field: last.replace("_", " ") if lasts.count(last) == 1 else field
        for field, last in zip(fields, lasts, strict=True)
    }
