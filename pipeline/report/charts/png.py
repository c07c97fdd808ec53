"""Charts as PNG files, for slides, pull requests and model cards."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from pipeline.report.charts.dots import objective_scene
from pipeline.report.charts.lines import curves_scene
from pipeline.report.charts.scene import Label, Line, Scene, outline
from pipeline.report.charts.styles import STYLES
from pipeline.report.data.report import Report
from pipeline.report.data.runs import Curve
from pipeline.report.text.metrics import upper_first

__all__ = ["chosen_curves", "curves_png", "pictures", "png"]

_WIDTH, _HEIGHT = 525.0, 300.0
"""In points; at two pixels a point the text is as large as a slide needs it."""
_DPI = 144
_TEXT, _MUTED, _GRID, _JOINED, _GROUND = "#1a1f26", "#59636e", "#e3e8ed", "#d6dce2", "#ffffff"
_WIDTHS = {"grid": 0.8, "joined": 1.5, "whisker": 1.75}
_ALONG_THE_WAY = 3
"""So many points are more than a start and an end."""
_COLUMNS_BELOW = 30
"""Labels shorter than this many characters fit side by side in the legend."""


def pictures(report: Report) -> dict[str, bytes]:
    """Return the PNG files for which there is data.

    `loss.png`, `kl.png` and `cross_entropy.png` hold curves, `sweep.png` the runs of a sweep.
    """
    files = {name: curves_png(curves) for name, curves in chosen_curves(report.curves).items()}
    facts = report.sweep
    if facts and (scene := objective_scene(facts, report.rows, width=_WIDTH)):
        files["sweep.png"] = png(scene)
    return files


def chosen_curves(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Return which curves go into which file, of those for which there are any.

    Of KL and cross-entropy the held-out values alone where they were measured along the way: beside
    the noise of the training steps their differences would not be seen. Else both.
    """
    chosen: dict[str, list[Curve]] = {}
    for curve in curves:
        words = curve.name.lower().replace("/", " ").replace("_", " ").split()
        if curve.group == "learning" and curve.points:
            if "loss" in words:
                chosen.setdefault("loss.png", []).append(curve)
            elif "kl" in words:
                chosen.setdefault("kl.png", []).append(curve)
            elif "cross-entropy" in words:
                chosen.setdefault("cross_entropy.png", []).append(curve)
    for name, some in chosen.items():
        held_out = [curve for curve in some if curve.name.lower().startswith("held-out")]
        if any(len(curve.points) >= _ALONG_THE_WAY for curve in held_out):
            chosen[name] = held_out
    return chosen


def curves_png(curves: Sequence[Curve]) -> bytes:
    """Draw curves into one chart; the same curves give the same bytes."""
    return png(curves_scene(curves, width=_WIDTH, height=_HEIGHT, most=600))


def png(scene: Scene) -> bytes:
    """Draw a chart under its heading, with a legend below where there is more than one line."""
    # The object interface: pyplot would keep the figure alive and could pick a window toolkit.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, Polygon

    figure: Any = Figure(figsize=(scene.width / 72, scene.height / 72), dpi=_DPI)
    FigureCanvasAgg(figure)
    # One unit of the axes is one point of the scene, with y downwards.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, scene.width), ylim=(scene.height, 0))
    axes.set_axis_off()
    for order, part in enumerate(scene.parts):
        if isinstance(part, Label):
            axes.text(part.x, part.y, _plain(part.text), ha=_ALIGN[part.anchor], zorder=order,
                      fontsize=11 if part.kind == "tick" else 12,
                      color=_MUTED if part.kind == "tick" else _TEXT)  # fmt: skip
        elif isinstance(part, Line):
            for stroke in part.strokes:
                xs, ys = zip(*stroke, strict=True)
                axes.add_line(Line2D(xs, ys, zorder=order, **_pen(part)))
        else:
            color = STYLES[part.style].light
            look: dict[str, Any] = {
                "ec": color,
                "fc": _GROUND if part.open else color,
                "lw": 2,
                "zorder": order,
            }
            round_ = part.shape == "circle"
            shape = Circle((part.x, part.y), part.size, **look) if round_ else None
            axes.add_patch(shape or Polygon(outline(part), **look))
    axes.text(
        0, -14, _plain(upper_first(scene.heading)), fontsize=12, fontweight="bold", color=_TEXT
    )
    if len(scene.legend) > 1:
        handles = [
            Line2D([], [], label=_plain(key.label), **_pen(Line("line", (), key.style, key.pale)))
            for key in scene.legend
        ]
        short = max(len(key.label) for key in scene.legend) < _COLUMNS_BELOW
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, scene.height + 4),
                    bbox_transform=axes.transData, frameon=False, fontsize=11,
                    ncols=2 if short else 1, handlelength=3, borderaxespad=0)  # fmt: skip
    buffer = io.BytesIO()
    # Without this the file names the version of matplotlib, and equal runs differ in bytes.
    metadata = {"Software": None}
    figure.savefig(buffer, format="png", metadata=metadata, bbox_inches="tight", pad_inches=0.12)
    return buffer.getvalue()


_ALIGN = {"start": "left", "middle": "center", "end": "right"}


def _pen(line: Line) -> dict[str, Any]:
    if line.kind == "line":
        style = STYLES[line.style]
        width = 1.0 if line.pale else style.width
        pen = {"color": style.light, "linewidth": width, "alpha": 0.45 if line.pale else 1.0}
        # The dashes are in points; matplotlib takes them as so many line widths.
        dashes = tuple(length / width for length in style.dash)
        return {**pen, "linestyle": (0, dashes) if dashes else "-"}
    color = {"grid": _GRID, "joined": _JOINED}.get(line.kind) or STYLES[line.style].light
    return {"color": color, "linewidth": _WIDTHS[line.kind]}


def _plain(text: str) -> str:
    # A dollar sign starts a formula in matplotlib, and a label with an odd one raises.
    return text.replace("$", r"\$")
