"""The report as one self-contained HTML page: no network, no script, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.amounts import (
    BYTES_PER_TOKEN,
    bytes_per_token,
    format_bytes,
    format_duration,
    format_kept_mass,
    value_decimals,
)
from pipeline.printable import code_of, is_harmless, render_template
from pipeline.report.charts.dots import rows_scene
from pipeline.report.charts.lines import averaged_over, curves_scene
from pipeline.report.charts.styles import STYLES
from pipeline.report.data.cache import CacheFacts
from pipeline.report.data.measures import Difference, Row
from pipeline.report.data.report import Report
from pipeline.report.data.runs import Curve, Speed
from pipeline.report.html.page_parts import Figure, Tile, figure
from pipeline.report.html.page_sweep import sweep_tiles, sweep_view
from pipeline.report.text.headline import headline
from pipeline.report.text.metrics import (
    METRICS,
    distance_of,
    lower_first,
    metric_decimals,
    shown_metrics,
)
from pipeline.report.text.numbers import (
    format_count,
    format_measure,
)
from pipeline.report.text.sentences import difference_sentence

__all__ = ["HEAT_STEPS_NATS", "render_page"]

HEAT_STEPS_NATS = (0.02, 0.1, 0.3, 0.8, 2.0)
"""A token's KL from each of these up gets the next stronger colour; fixed, so that two reports
can be laid side by side."""

_MOST_ROWS = 24

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def render_page(report: Report) -> str:
    """Return the page; every text of the report is escaped on the way in."""
    filters: dict[str, Callable[..., object]] = {
        "count": format_count,
        "duration": format_duration,
        "bytes": format_bytes,
        "bytes_per_token": _per_token,
        "mass": format_kept_mass,
        "visible": _visible,
        "lead": _lead,
        "body": _body,
    }
    return render_template(
        _TEMPLATE,
        filters,
        report=report,
        headline=headline(report),
        tiles=_tiles(report),
        table=_result_table(report.rows),
        differences=[_difference(item, report.rows) for item in report.differences],
        dots=_dot_charts(_compared_rows(report)),
        learning=_line_charts(report, "learning"),
        speed=_line_charts(report, "speed"),
        speed_columns=_speed_columns(report.speeds),
        sweep=sweep_view(report),
        heat=_heat,
        styles=STYLES,
        heat_steps=HEAT_STEPS_NATS,
        environment=list(_flat(report.environment)),
    )


def _speed_columns(speeds: Sequence[Speed]) -> dict[str, bool]:
    """Return which columns say something: a CPU has no GPU's, one process no rate of its own."""
    return {
        "device": any(s.tokens_per_s_per_device not in (None, s.tokens_per_s) for s in speeds),
        "mfu": any(s.mfu is not None for s in speeds),
        "gpu": any(s.device_peak_gib is not None for s in speeds),
        "skipped": any(s.skipped_updates for s in speeds),
    }


def _tiles(report: Report) -> list[Tile]:
    if report.sweep is not None:
        return [*sweep_tiles(report.sweep, report.speeds), *_cache_tiles(report)]
    by_kind: dict[str, Row] = {}
    for row in report.rows:
        by_kind.setdefault(row.kind, row)
    distilled, before, control = (by_kind.get(k) for k in ("distilled", "before", "control"))
    tiles = []
    metric = distance_of(distilled)
    if distilled is not None and metric is not None:
        kl = distilled.metrics[metric.key].value
        label = f"{metric.unit} of {lower_first(metric.label)}"
        note = _compared(metric.key, control)
        if before is not None and metric.key in before.metrics:
            start = before.metrics[metric.key].value
            tiles.append(Tile(label, f"{_nats(start)} → {_nats(kl)}", note))
            if start > 0:
                closed = f"{100 * (start - kl) / start:.0f} %"
                tiles.append(Tile("of the distance closed", closed, "from before to after"))
        else:
            tiles.append(Tile(label, _nats(kl), note))
    if distilled is not None and "top1_agreement" in distilled.metrics:
        share = 100 * distilled.metrics["top1_agreement"].value
        note = _compared("top1_agreement", control)
        tiles.append(Tile("same first choice as the teacher", f"{share:.1f} %", note))
    return [*tiles, *_cache_tiles(report)]


def _cache_tiles(report: Report) -> list[Tile]:
    cache = report.cache
    if cache is None or not cache.loss_tokens:
        return []
    size = f"{format_bytes(cache.size_bytes)} for {format_count(cache.loss_tokens)} sparse targets"
    return [Tile(BYTES_PER_TOKEN, _per_token(cache).split()[0], size)]


def _per_token(cache: CacheFacts) -> str:
    return f"{bytes_per_token(cache.size_bytes, cache.loss_tokens):.1f} {BYTES_PER_TOKEN}"


def _nats(value: float) -> str:
    """Return a distance with two decimals, or as many as tell it from 0."""
    return f"{value:.{max(2, value_decimals(value))}f}"


def _compared(key: str, control: Row | None) -> str:
    if control is None or key not in control.metrics:
        return "on held-out text"
    value, _ = format_measure(control.metrics[key], METRICS[key], decimals=None)
    unit = METRICS[key].unit
    return f"the control ends at {value} {unit}".rstrip()


def _result_table(rows: Sequence[Row]) -> dict[str, Any]:
    metrics = shown_metrics(rows)
    decimals = {metric.key: metric_decimals(metric, rows) for metric in metrics}
    lines = [
        {
            "row": row,
            "cells": [
                format_measure(row.metrics.get(m.key), m, decimals=decimals[m.key]) for m in metrics
            ],
        }
        for row in rows
    ]
    return {
        "metrics": metrics,
        "lines": lines,
        "has_parameters": any(row.num_parameters for row in rows),
        "has_detail": any(row.detail for row in rows),
    }


def _difference(difference: Difference, rows: Sequence[Row]) -> dict[str, Any]:
    known = difference.standard_errors is not None
    verdict = "clear" if difference.clear else "within noise" if known else "unknown error"
    return {
        "sentence": difference_sentence(difference, rows),
        # Not "clear": Jinja would find the dictionary's method of that name, which is true.
        "is_clear": difference.clear,
        "verdict": verdict,
    }


def _compared_rows(report: Report) -> Sequence[Row]:
    # Of a sweep the runs alone: beside the untrained student their differences would not be seen.
    ranked = [row for row in report.rows if row.rank][:_MOST_ROWS]
    return ranked if report.sweep is not None and len(ranked) > 1 else report.rows


def _dot_charts(rows: Sequence[Row]) -> list[Figure]:
    return [
        figure(
            rows_scene(rows, metric),
            identity=f"dots-{metric.key}",
            note=("lower is better: " if metric.lower_is_better else "higher is better: ")
            + metric.explanation,
        )
        for metric in shown_metrics(rows)
    ]


def _line_charts(report: Report, group: str) -> list[Figure]:
    by_name: dict[str, list[Curve]] = {}
    for curve in report.curves:
        if curve.group == group and curve.points:
            by_name.setdefault(curve.name, []).append(curve)
    figures = []
    for number, curves in enumerate(by_name.values()):
        averaged = averaged_over(curves)
        figures.append(
            figure(
                curves_scene(curves),
                identity=f"{group}-{number}",
                note=f"each point is the mean of {averaged} logged values" if averaged > 1 else "",
                # The runs of a sweep have one legend for all of their curves.
                with_legend=report.sweep is None,
            )
        )
    return figures


def _heat(kl: float | None) -> int:
    """Return the colour step of a token, 0 (as the teacher) to 5."""
    return 0 if kl is None else sum(kl >= step for step in HEAT_STEPS_NATS)


def _flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += _flat(value, f"{name} / ")
        elif isinstance(value, (list, tuple)):
            rows.append((name, ", ".join(map(str, value)) or "none"))
        elif name.endswith("_bytes") and isinstance(value, (int, float)):
            rows.append((name.removesuffix("_bytes"), format_bytes(value)))
        else:
            rows.append((name, "none" if value is None else str(value)))
    return rows


def _visible(text: str) -> str:
    """Return one token so that its white space can be seen."""
    marks = {"\n": "↵", "\t": "→", "\r": "␍"}
    inner = text.strip(" ")
    lead = len(text) - len(text.lstrip(" "))
    trail = len(text) - lead - len(inner)
    shown = "".join(
        marks.get(char) or (char if is_harmless(char) else code_of(char)) for char in inner
    )
    return "·" * lead + shown + "·" * trail if inner else "·" * len(text) or "(empty)"


def _lead(text: str) -> str:
    """Return the spaces in front of a word, which stay uncoloured: they may end a line."""
    return text[: len(text) - len(text.lstrip(" "))] if text.strip(" ") else ""


def _body(text: str) -> str:
    return text[len(_lead(text)) :]
