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
    shards: int
    described: str


SIZES = (
    Size("S", 100_000, 50, "100 k, 50 M, 50"),
    Size("M", 2_000_000, 5_000, "2 M, 5 B, 5,000"),
    Size("L", 50_000_000, 200_000, "50 M, 500 B, 200,000"),
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
        line("rows, tokens, shards", lambda n: sizes[n].described),
        line(
            "requests of a restart: to its first shard, over a complete cache",
            lambda n: f"{restarts[n]['unfinished']}, {restarts[n]['complete']}",
        ),
        line(
            "requests that finish the cache, of one worker; manifest in kB",
            lambda n: f"{ends[n]['requests']}; {round(ends[n]['manifest_bytes'] / 1000)}",
        ),
        line(
            "a training process's plan in MiB; bytes that 8 read in an epoch, over the cache's",
            lambda n: (
                f"{plan_mib(sizes[n].rows):.0f}; "
                f"{read_amplification(8, shards=min(sizes[n].shards, _LARGEST_STREAM)):.2f}"
            ),
        ),
    ]
