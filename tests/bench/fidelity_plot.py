"""The plot that README opens with: gradient error over bytes, and how it falls with the tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tests.bench.fidelity import Table

__all__ = ["plot", "save"]

RESULTS = Path("runs/bench")
_BLUE, _GREEN, _ORANGE, _PINK = "#0072b2", "#009e73", "#e69f00", "#cc79a7"
_FAMILIES = (
    ("sampled, for one temperature", _BLUE, "o"),
    ("sampled, T = 1 and 2 from one cache", _GREEN, "s"),
    ("top-k and one bucket", _ORANGE, "^"),
    ("top-8 and a sampled tail", _PINK, "D"),
)
_SHOWN = {
    "DistillKit recommended, zero": ("DistillKit", (0, 7, "center")),
    "DistillKit recommended, zero, rebuilt": ("DistillKit, rebuilt", (0, 7, "center")),
    "DistillKit recommended with normalize_t, symmetric_uniform": (
        "DistillKit, bucket", (0, -14, "center"),
    ),
    "DistillKit budget, zero": ("DistillKit budget", (-6, 5, "right")),
    "DistillKit budget, zero, rebuilt": ("DistillKit budget, rebuilt", (-6, 5, "right")),
    "Axolotl, k = 64, default": ("Axolotl", (0, 7, "center")),
    "Axolotl, k = 64, rebuilt": ("Axolotl, rebuilt", (0, -14, "center")),
    "Megatron-LM, k = 64, ghost token": ("Megatron-LM", (0, 7, "center")),
    "random-sampling KD, 50 draws, rebuilt": ("random sampling, rebuilt", (8, 3, "left")),
}  # fmt: skip
"""Rows of other projects' code in the plot, and rebuilt ones; it has no room for all. Label,
points to the right and up, alignment. What stores nothing has no place."""


def save(table: Table, part: str, counts: tuple[int, ...]) -> None:
    """Keep a table for the plot, which shows both parts of the bench."""
    rows = {
        name: {"bytes": row.bytes_per_token, "at": {f"{t:g}": e for t, e in row.at.items()}}
        for name, row in table.items()
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"fidelity-{part}.json"
    file.write_text(json.dumps({"counts": counts, "rows": rows}, indent=1))


def plot(file: Path) -> None:
    """Draw error over bytes at T = 1 and T = 2 and, where it was measured, over the tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fidelity"
    short, long = (_read(part) for part in ("short", "long"))
    if short is None:
        return
    panels = 3 if long else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(5.2 * panels, 4.6))
    for axis, temperature in zip(axes, ("1", "2"), strict=False):
        _over_bytes(axis, short["rows"], temperature)
        axis.set_title(f"T = {temperature}: {short['counts'][-1]:,} tokens", loc="left")
        axis.set_xlabel("bytes per token, everything included")
    axes[0].set_ylabel("error of the weight gradient, %")
    axes[0].legend(frameon=False, fontsize=9, loc="upper left")
    for axis in axes:
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(True, which="both", linewidth=0.4, color="#dddddd")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for axis in axes[:2]:
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlim(7, 3000)
        axis.set_ylim(0.5, 1500)
    if long:
        _over_tokens(axes[2], long)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, facecolor="white", metadata={"Date": None})


def _read(part: str) -> Any:
    file = RESULTS / f"fidelity-{part}.json"
    return json.loads(file.read_text()) if file.exists() else None


def _family(name: str) -> int | None:
    if name.startswith("threshold"):
        return int(name.count("/") == 2)
    if name.startswith("top-"):
        return 2 if name.endswith("bucket") else 3
    return None


def _over_bytes(axis: Axes, rows: dict[str, Any], temperature: str) -> None:
    for family, (label, colour, marker) in enumerate(_FAMILIES):
        points = sorted(
            (row["bytes"], 100 * row["at"][temperature][-1])
            for name, row in rows.items()
            if _family(name) == family and temperature in row["at"]
        )
        if points:
            axis.plot(
                *zip(*points, strict=True),
                color=colour, marker=marker, label=label, linewidth=1.8,
            )  # fmt: skip
    for name, row in rows.items():
        if name in _SHOWN and row["bytes"] is not None and temperature in row["at"]:
            label, (dx, dy, side) = _SHOWN[name]
            place = (row["bytes"], 100 * row["at"][temperature][-1])
            axis.plot(*place, "x", color="#555555", markersize=7)
            axis.annotate(
                label, place, textcoords="offset points", xytext=(dx, dy), fontsize=8,
                ha=side, color="#333333",
            )  # fmt: skip


def _over_tokens(axis: Axes, long: dict[str, Any]) -> None:
    for name, row in long["rows"].items():
        colour, marker = _FAMILIES[_family(name) or 0][1:]
        label = f"{name}: {row['bytes']:.0f} bytes"
        errors = [100 * error for error in row["at"]["2"]]
        axis.plot(long["counts"], errors, color=colour, marker=marker, label=label, linewidth=1.8)
    axis.set_title("T = 2: a bias stays, noise does not", loc="left")
    axis.set_xlabel("tokens")
    axis.set_xticks(long["counts"], [f"{count:,}" for count in long["counts"]])
    axis.set_yticks((5, 10, 20, 40), ("5", "10", "20", "40"))
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=9)
    axis.set_ylim(5, 60)
