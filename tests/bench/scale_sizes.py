"""README's table of costs: what corpora of three sizes ask of the store, of memory and of the disk.

python -m tests.bench.scale --sections sizes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.bench.scale_data import plan_mib, read_amplification
from tests.bench.scale_records import finalize_cost, restart_cost

__all__ = ["figures", "rows_of_table"]


@dataclass(frozen=True, slots=True)
class Size:
    """A corpus."""

    name: str
    rows: int
    tokens: str
    shards: int


SIZES = (
    Size("S", 100_000, "50 M", 50),
    Size("M", 2_000_000, "5 B", 5_000),
    Size("L", 50_000_000, "500 B", 200_000),
)
_LARGEST_STREAM = 1024
"""Shards that a stream is run over; the share of a rank does not grow with more."""


def figures() -> dict[str, float]:
    """Print the table; its figures have no limits of their own."""
    print("\n".join(rows_of_table(SIZES)))
    return {}


def rows_of_table(sizes: Sequence[Size]) -> list[str]:
    """Measure, and return the lines of the table in Markdown."""
    ends = [finalize_cost(size.shards, single=min(320, size.shards // 2)) for size in sizes]
    restarts = [restart_cost(size.shards, single=min(320, size.shards // 2)) for size in sizes]

    def line(what: str, value: Callable[[int], object]) -> str:
        return f"| {what} | " + " | ".join(str(value(n)) for n in range(len(sizes))) + " |"

    return [
        line("", lambda n: sizes[n].name),
        "|---|" + "---|" * len(sizes),
        line("rows", lambda n: f"{sizes[n].rows:,}"),
        line("tokens", lambda n: sizes[n].tokens),
        line("shards", lambda n: f"{sizes[n].shards:,}"),
        line(
            "requests of a restart, to its first shard",
            lambda n: restarts[n]["unfinished"],
        ),
        line("requests of a restart over a complete cache", lambda n: restarts[n]["complete"]),
        line("requests that finish the cache, of one worker", lambda n: ends[n]["requests"]),
        line("manifest, kB", lambda n: round(ends[n]["manifest_bytes"] / 1000)),
        line("a training process's plan, MiB", lambda n: f"{plan_mib(sizes[n].rows):.0f}"),
        line(
            "bytes that 8 processes read in an epoch, over those of the cache",
            lambda n: f"{read_amplification(8, shards=min(sizes[n].shards, _LARGEST_STREAM)):.2f}",
        ),
    ]
