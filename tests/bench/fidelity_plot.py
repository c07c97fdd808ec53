"""The plot of gradient error over bytes per token that README opens with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.bench.fidelity import Errors

__all__ = ["plot"]

_FAMILIES = (
    ("threshold (one temperature)", "threshold, tau = 1/", "#0072b2", "o", False),
    ("threshold (T = 1 and 2 from one cache)", "threshold, tau = 1/", "#009e73", "s", True),
    ("top-k + bucket", "top-", "#e69f00", "^", None),
)


def plot(table: dict[str, Errors], file: Path, *, tokens: int) -> None:
    """Draw error at T = 1 (left) and T = 2 (right) over bytes per token, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axis, temperature in zip(axes, (1.0, 2.0), strict=True):
        named = set()
        for label, prefix, colour, marker, two in _FAMILIES:
            points = [
                (row.bytes_per_token, 100 * row.at[temperature][-1])
                for name, row in table.items()
                if name.startswith(prefix)
                and temperature in row.at
                and (two is None or (name.count("/") == 2) == two)
            ]
            named |= {name for name in table if name.startswith(prefix)}
            if points:
                axis.plot(
                    *zip(*sorted(points), strict=True),
                    color=colour, marker=marker, label=label, linewidth=1.8,
                )  # fmt: skip
        for name, row in table.items():
            if name not in named and temperature in row.at:
                place = row.bytes_per_token, 100 * row.at[temperature][-1]
                axis.plot(*place, "x", color="#555555", markersize=7)
                axis.annotate(
                    name.split(" (")[0], place,
                    textcoords="offset points", xytext=(6, 4), fontsize=8, color="#333333",
                )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("bytes per token, everything included")
        axis.set_title(f"T = {temperature:g}", loc="left", fontsize=11)
        axis.grid(True, which="both", linewidth=0.4, color="#dddddd")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel(f"error of the weight gradient, % ({tokens:,} tokens)")
    axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
