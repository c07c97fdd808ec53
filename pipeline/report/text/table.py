"""The result as plain text for a terminal, a log or a pull request: at most 100 columns."""

from __future__ import annotations

import textwrap

from pipeline.report.data.measures import Row
from pipeline.report.data.report import Report
from pipeline.report.text.headline import headline
from pipeline.report.text.metrics import Metric, metric_decimals, shown_metrics
from pipeline.report.text.numbers import format_measure
from pipeline.report.text.sentences import difference_sentence

__all__ = ["WIDTH", "terminal_table"]

WIDTH = 100
_NAME_WIDTH = 22
_RANKED_NAME_WIDTH = 38
"""Names of a sweep's runs say their settings."""
_GAP = "  "


def terminal_table(report: Report) -> str:
    """Return the answer, one aligned line a model, and every difference in words."""
    lines = textwrap.wrap(headline(report), WIDTH)
    if report.rows:
        lines += ["", *_table(report.rows)]
        lines += [metric.note for metric in shown_metrics(report.rows) if metric.note]
    told = report.differences
    if report.sweep is not None:
        # Three sentences a run would bury the answer; those of the objective are enough.
        told = tuple(p.difference for p in report.sweep.points if p.difference is not None)
    sentences = [difference_sentence(item, report.rows) for item in told]
    # The answer on top is one of the differences more often than not; once is enough.
    rest = [sentence for sentence in sentences if sentence != headline(report)]
    if rest:
        lines.append("")
    for sentence in rest:
        lines += textwrap.wrap(sentence, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines) + "\n"


def _table(rows: tuple[Row, ...]) -> list[str]:
    metrics = shown_metrics(rows)
    width = _RANKED_NAME_WIDTH if any(row.rank for row in rows) else _NAME_WIDTH
    names = [_cut(f"{row.rank}. {row.name}" if row.rank else row.name, width) for row in rows]
    columns = [["model", *names]]
    for metric in metrics:
        column = _column(metric, rows)
        if sum(_width(c) + len(_GAP) for c in columns) + _width(column) > WIDTH:
            break
        columns.append(column)
    widths = [_width(column) for column in columns]
    lines = []
    for i in range(len(rows) + 1):
        cells = [
            column[i].ljust(width) if n == 0 else column[i].rjust(width)
            for n, (column, width) in enumerate(zip(columns, widths, strict=True))
        ]
        lines.append(_GAP.join(cells).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    # Perplexity is the last, and says what the cross-entropy says.
    missing = [m.label for m in metrics[len(columns) - 1 :] if m.key != "perplexity"]
    if missing:
        lines.append(f"(not shown for want of room: {', '.join(missing)})")
    return lines


def _column(metric: Metric, rows: tuple[Row, ...]) -> list[str]:
    decimals = metric_decimals(metric, rows)
    parts = [format_measure(row.metrics.get(metric.key), metric, decimals=decimals) for row in rows]
    # The errors are padded on their own, so that the points of the values stay in line.
    error_width = max((len(error) for _, error in parts), default=0)
    cells = [f"{value} {error:<{error_width}}" if error_width else value for value, error in parts]
    return [_header(metric), *cells]


def _header(metric: Metric) -> str:
    return f"{metric.short} ({metric.unit})" if metric.unit else metric.short


def _width(column: list[str]) -> int:
    return max(len(cell) for cell in column)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
