"""The learning curves as PNG files, for slides, pull requests and model cards."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from pipeline.report.charts.scale import thin
from pipeline.report.data.runs import Curve
from pipeline.report.data.sweep import SweepFacts

__all__ = ["curves_png", "png_curves", "sweep_png"]

_COLORS = {"distilled": "#0072B2", "control": "#D55E00", "before": "#6C7580", "teacher": "#009E73"}
_STYLES = {"distilled": "-", "control": "--", "before": ":", "teacher": "-."}

_RANKED = ("#0072B2", "#C25000", "#00805D", "#A34E87", "#7A6A00", "#1A6F8F", "#59636E", "#1A1F26")
_RANKED_STYLES = (
    "-",
    "--",
    ":",
    "-.",
    (0, (8, 2)),
    (0, (3, 1)),
    (0, (6, 2, 1, 2, 1, 2)),
    (0, (1, 3)),
)
_OTHER = "#AAB3BC"
_DENSE_POINTS = 100
_MOST_BARS = 40


def png_curves(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Return which curves go into which file: `loss.png` and `kl.png`, if there are any."""
    chosen: dict[str, list[Curve]] = {}
    for curve in curves:
        words = curve.name.lower().replace("/", " ").replace("_", " ").split()
        if curve.group == "learning" and curve.points:
            if "loss" in words:
                chosen.setdefault("loss.png", []).append(curve)
            elif "kl" in words:
                chosen.setdefault("kl.png", []).append(curve)
    return chosen


def curves_png(curves: Sequence[Curve]) -> bytes:
    """Draw curves into one chart; the same curves give the same bytes."""
    # The object interface: pyplot would keep the figure alive and could pick a window toolkit.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7.0, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    several_names = len({curve.name for curve in curves}) > 1
    for curve in curves:
        points, _ = thin(curve.points, most=600)
        parts = [part for part in (curve.name if several_names else "", curve.series) if part]
        # A noisy line of every step would hide the few measured points that matter more.
        dense = len(points) > _DENSE_POINTS
        pale = several_names and dense
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color=_color(curve.rank) if curve.rank else _COLORS[curve.kind],
            linestyle=_style(curve.rank) if curve.rank else _STYLES[curve.kind],
            alpha=0.45 if pale else 1.0,
            linewidth=1.0 if pale else 1.6,
            zorder=2 if pale else 3,
            marker=None if dense else "o",
            markersize=3.5,
            label=_plain(", ".join(parts)) or None,
        )
    unit = f" ({curves[0].unit})" if curves[0].unit else ""
    axes.set_xlabel("step")
    axes.set_ylabel(_plain(("KL" if several_names else curves[0].name) + unit))
    axes.grid(color="#E3E8ED", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize="small" if len(curves) > 6 else None)
    return _saved(figure)


def sweep_png(facts: SweepFacts) -> bytes | None:
    """Draw the objective of every run, the best on top, with two standard errors; none of none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [p for p in facts.points if p.rank and p.objective is not None][:_MOST_BARS]
    if not points:
        return None
    figure: Any = Figure(figsize=(7.0, 1.2 + 0.34 * len(points)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, point in enumerate(points):
        assert point.objective is not None
        error = point.objective.standard_error
        axes.errorbar(
            point.objective.value,
            -place,
            xerr=None if error is None else 2 * error,
            fmt="o",
            color=_color(point.rank),
            capsize=3,
        )
    names = [f"#{p.rank} {p.label}" + (" *" if p.verdict == "within noise" else "") for p in points]
    axes.set_yticks([-place for place in range(len(points))], [_plain(_cut(n)) for n in names])
    unit = f" ({facts.unit})" if facts.unit else ""
    noise = any(p.verdict == "within noise" for p in points)
    axes.set_xlabel(_plain(facts.label + unit) + ("    * within noise of the best" * noise))
    axes.grid(axis="x", color="#E3E8ED", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return _saved(figure)


def _saved(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # Without this the file names the version of matplotlib, and equal runs differ in bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _color(rank: int) -> str:
    return _RANKED[rank - 1] if rank <= len(_RANKED) else _OTHER


def _style(rank: int) -> Any:
    return _RANKED_STYLES[rank - 1] if rank <= len(_RANKED_STYLES) else "-"


def _cut(text: str) -> str:
    return text if len(text) <= 48 else text[:47] + "…"


def _plain(text: str) -> str:
    # A dollar sign starts a formula in matplotlib, and a label with an odd one raises.
    return text.replace("$", r"\$")
