"""What stage two costs as the cache and the ranks grow: reading, planning, memory.

`python -m tests.bench.scale_data` prints these figures and some beside them. Sources are made up:
rows of random lengths, of which a plan reads the lengths alone. Numba's compiled kernels are cached
on disk and made before the clock starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.data.order.plan import TrainPlan
from pipeline.data.settings import DataSettings
from pipeline.data.stream.train_stream import TrainStream

__all__ = [
    "figures", "plan_mib", "plan_mib_per_rank_1b", "plan_seconds_50m", "read_amplification",
    "read_amplification_world8",
]  # fmt: skip

ROWS_PER_SHARD = 7_000
"""About a million tokens, as `capture.shard_tokens` makes shards."""
MAX_LENGTH = 2_048
PERIOD_SHARDS = 200
"""Shards whose lengths are drawn, 11 MB; a larger split repeats them."""


class MappedSizes:
    """Sizes of any number of rows: a mapped file, seen again and again where it has fewer."""

    def __init__(self, file: Path, rows: int, *, periods: int = 1) -> None:
        """Make the file, of so many periods of the drawn shards, and map it."""
        rng = np.random.default_rng(0)
        count = PERIOD_SHARDS * ROWS_PER_SHARD
        lengths = np.clip(rng.lognormal(4.8, 0.7, count), 16, MAX_LENGTH).astype(np.int32)
        with file.open("wb") as target:
            for _ in range(periods):
                np.stack([lengths, lengths * 3 // 4], 1).tofile(target)
        self._sizes_R2 = np.memmap(file, np.int32, "r").reshape(-1, 2)
        self._shards = periods * PERIOD_SHARDS
        self._rows = rows

    def shard_rows(self) -> Sequence[int]:
        """Return the rows of each shard; the last one can be smaller."""
        whole, rest = divmod(self._rows, ROWS_PER_SHARD)
        return [ROWS_PER_SHARD] * whole + [rest] * (rest > 0)

    def shard_sizes(self, shard: int) -> NDArray[np.int32]:
        """Return tokens and supervised tokens of every row of a shard."""
        start = shard % self._shards * ROWS_PER_SHARD
        count = min(ROWS_PER_SHARD, self._rows - shard * ROWS_PER_SHARD)
        return self._sizes_R2[start : start + count]


def _plan(source: Any) -> TrainPlan:
    return TrainPlan(
        source, seed=0, packs_per_step=512, pack_length=MAX_LENGTH, shuffle_shards=8, lanes=64
    )


def plan_seconds_50m() -> float:
    """Return the seconds from lengths to the first step of 50 million rows, totals included.

    The steps of an epoch and the tokens of three are known then, and a step in the middle of the
    third, as a run that resumes there needs it.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder) / "sizes"
        _plan(MappedSizes(file, 100_000)).step(0)
        source = MappedSizes(file, 50_000_000, periods=36)  # all of it: 400 MB
        started = time.monotonic()
        plan = _plan(source)
        plan.step(0)
        assert plan.tokens_before(3 * plan.steps_per_epoch) == 3 * plan.totals.tokens
        plan.step(5 * plan.steps_per_epoch // 2)
        return time.monotonic() - started


def plan_mib_per_rank_1b() -> float:
    """Return `plan_mib` of a billion rows."""
    return plan_mib(1_000_000_000)


def plan_mib(rows: int) -> float:
    """Return the MiB of private memory that a rank's plan of so many rows takes.

    Pages of the file of lengths are not among them: the ranks of a node share these, and the
    kernel drops them when memory is short.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder) / "sizes"
        command = [sys.executable, "-m", "tests.bench.scale_data", "--memory", str(file), str(rows)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _private_mib() -> float:
    fields = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in fields if line.startswith("Anonymous:")]
    return int(line.split()[1]) / 1024


def _measure_memory(file: Path, rows: int) -> None:
    """Plan so many rows in this process and print what it added."""
    warm = _plan(MappedSizes(file, 2_000_000))
    warm.step(0)
    del warm
    before = _private_mib()
    plan = _plan(MappedSizes(file, rows))
    most = 0.0
    for step in range(0, 2 * plan.steps_per_epoch, max(1, plan.steps_per_epoch // 8)):
        plan.step(step)
        plan.shards_ahead(step, range(8), steps=32)
        most = max(most, _private_mib() - before)
    print(json.dumps(most))


class CountedRows:
    """Tiny rows that hold no target; counts the shards that are read."""

    def __init__(self, shards: int, rows_per_shard: int) -> None:
        """Draw lengths."""
        rng = np.random.default_rng(0)
        lengths = rng.integers(2, 33, (shards, rows_per_shard, 1), np.int32)
        self._sizes_SR2 = np.concatenate([lengths, np.zeros_like(lengths)], 2)
        self._held: set[int] = set()
        self.loads = 0

    def shard_rows(self) -> Sequence[int]:
        """Return the rows of each shard."""
        return [self._sizes_SR2.shape[1]] * len(self._sizes_SR2)

    def shard_sizes(self, shard: int) -> NDArray[np.int32]:
        """Return tokens and supervised tokens, of which there are none."""
        sizes_R2: NDArray[np.int32] = self._sizes_SR2[shard]
        return sizes_R2

    def shard_name(self, shard: int) -> str:
        """Return a name."""
        return str(shard)

    def open(self, shard: int) -> None:
        """Read a shard unless it is at hand."""
        if shard not in self._held:
            self.loads += 1
            self._held.add(shard)

    def keep(self, shards: Collection[int]) -> None:
        """Drop all other shards."""
        self._held &= set(shards)

    def reading(self) -> Sequence[str]:
        """Return nothing."""
        return ()

    def read_rows(self, shard: int, rows: Sequence[int]) -> list[CachedSequence]:
        """Return rows of the right length."""
        self.open(shard)
        return [_row(int(self._sizes_SR2[shard, row, 0])) for row in rows]


def _row(length: int) -> CachedSequence:
    none, table = np.zeros(0, np.float32), np.zeros((0, 1), np.float32)
    targets = SparseTargets(
        counts_N=np.zeros(0, np.int32), token_ids_E=np.zeros(0, np.int32), logprobs_E=none,
        inclusion_E=None, temperatures=(1.0,), log_z_NG=table, entropy_NG=table,
        label_logprob_N=none,
    )  # fmt: skip
    return CachedSequence("", np.zeros(length, np.int32), np.zeros(length, np.bool_), targets)


def read_amplification(
    world_size: int, *, shards: int = 256, packs_per_step: int = 64, **settings: Any
) -> float:
    """Return shards read by all ranks in one epoch over shards of the cache.

    Through the whole stream, with reading ahead in the reader's thread, so that two runs count
    alike.
    """
    loads = 0
    for rank in range(world_size):
        source = CountedRows(shards, rows_per_shard=48)
        stream = TrainStream(
            source,
            DataSettings(read_threads=0, **settings),
            seed=0,
            packs_per_step=packs_per_step,
            rank=rank,
            world_size=world_size,
            accumulation=packs_per_step // world_size,
            pack_length=64,
            temperature=1.0,
        )
        for _ in stream.steps(0, stream.steps_per_epoch):
            pass
        loads += source.loads
    return loads / shards


def read_amplification_world8() -> float:
    """Return `read_amplification` of eight ranks."""
    return read_amplification(8)


def figures() -> dict[str, float]:
    """Return what `make bench-scale` shows."""
    return {
        "read_amplification_world8": read_amplification_world8(),
        "plan_seconds_50m": plan_seconds_50m(),
        "plan_mib_per_rank_1b": plan_mib_per_rank_1b(),
    }


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--memory"]:
        _measure_memory(Path(sys.argv[2]), int(sys.argv[3]))
        return
    for world_size in (1, 2, 4, 8):
        print(f"{'read amplification, world ' + str(world_size):<40}", end="")
        print(f"{read_amplification(world_size):>10.3f}")
    for world_size in (6, 12):
        print(f"{'the same, world ' + str(world_size) + ', shared lanes':<40}", end="")
        print(f"{read_amplification(world_size, packs_per_step=192):>10.3f}")
    for name, settings in (("no packing", {"packing": False}), ("tokens", {"batch_tokens": 8192})):
        print(f"{'the same, world 8, ' + name:<40}{read_amplification(8, **settings):>10.3f}")
    print(f"{'plan of 50 million rows, s':<40}{plan_seconds_50m():>10.2f}")
    print(f"{'plan of a billion rows, private MiB':<40}{plan_mib_per_rank_1b():>10.1f}")


if __name__ == "__main__":
    main()
