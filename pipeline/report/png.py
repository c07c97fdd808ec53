"""The learning curves as PNG files, for slides, pull requests and model cards."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from pipeline.report.model import Curve
from pipeline.report.scale import thin

__all__ = ["curves_png", "png_curves"]

_COLORS = {"distilled": "#0072B2", "control": "#D55E00", "before": "#6C7580", "teacher": "#009E73"}
_STYLES = {"distilled": "-", "control": "--", "before": ":", "teacher": "-."}

_DENSE_POINTS = 100


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
            color=_COLORS[curve.kind],
            linestyle=_STYLES[curve.kind],
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
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    # Without this the file names the version of matplotlib, and equal runs differ in bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _plain(text: str) -> str:
    # A dollar sign starts a formula in matplotlib, and a label with an odd one raises.
    return text.replace("$", r"\$")
