"""A cache in memory that counts what is read of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.cache.io.reader import ShardDamaged

GRID = (1.0, 2.0)


class FakeSource:
    """Rows of random lengths; token i of row r of shard s is made of (s, r, i)."""

    def __init__(
        self,
        shard_rows: Sequence[int],
        *,
        longest: int = 12,
        seed: int = 0,
        inclusion: bool = False,
    ) -> None:
        """Draw lengths, masks and targets."""
        rng = np.random.default_rng(seed)
        self._shard_rows = list(shard_rows)
        self.reads: list[tuple[int, int]] = []
        self.opened: list[int] = []
        self.hanging: list[str] = []
        self.damaged: set[int] = set()
        self.calls = 0
        self.fail_after: int | None = None
        self.rows = [
            [_sequence(rng, shard, row, longest, inclusion) for row in range(rows)]
            for shard, rows in enumerate(shard_rows)
        ]
        every = [sequence for shard in self.rows for sequence in shard]
        self._sizes_R2 = np.array(
            [(len(s.input_ids_L), int(s.loss_mask_L.sum())) for s in every], np.int32
        ).reshape(-1, 2)
        self.held: set[int] = set()
        self.loads: list[int] = []
        self.most_held = 0
        self._lock = threading.Lock()

    def shard_rows(self) -> Sequence[int]:
        """Rows of each shard."""
        return self._shard_rows

    def shard_name(self, shard: int) -> str:
        """Return a name."""
        return f"shard-{shard}"

    def open(self, shard: int) -> None:
        """Remember that the shard was wanted, and hold it."""
        self.opened.append(shard)
        self._load(shard)

    def _load(self, shard: int) -> None:
        with self._lock:
            if shard not in self.held:
                self.loads.append(shard)
                self.held.add(shard)

    def reading(self) -> Sequence[str]:
        """Return what hangs."""
        return self.hanging

    def shard_sizes(self, shard: int) -> NDArray[np.int32]:
        """Tokens and supervised tokens of each row of a shard."""
        start = sum(self._shard_rows[:shard])
        return self._sizes_R2[start : start + self._shard_rows[shard]]

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row of all shards."""
        return self._sizes_R2[:, 0]

    def loss_token_counts(self) -> NDArray[np.int32]:
        """Supervised tokens of each row of all shards."""
        return self._sizes_R2[:, 1]

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say that rows have these lengths; for plans, which do not read them."""
        self._sizes_R2[:, 0] = lengths

    def keep(self, shards: Collection[int]) -> None:
        """Remember what is wanted, and let go of the rest."""
        self.held &= set(shards)
        self.most_held = max(self.most_held, len(shards))

    def read_rows(self, shard: int, rows: Sequence[int]) -> list[CachedSequence]:
        """Return rows, remembering which."""
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise OSError("the disk is gone")
        if shard in self.damaged:
            raise ShardDamaged(self.shard_name(shard), "a bit flipped", cache_url="memory://cache")
        self._load(shard)
        self.reads += [(shard, row) for row in rows]
        return [self.rows[shard][row] for row in rows]


def _sequence(
    rng: np.random.Generator, shard: int, row: int, longest: int, inclusion: bool
) -> CachedSequence:
    length = int(rng.integers(1, longest + 1))
    loss_mask_L = rng.random(length) < 0.6
    loss_mask_L[0] = False
    n = int(loss_mask_L.sum())
    counts_N = rng.integers(0, 6, n).astype(np.int32)
    entries = int(counts_N.sum())
    ids = [np.sort(rng.choice(50, count, replace=False)) for count in counts_N]
    return CachedSequence(
        sample_id=f"{shard:016x}{row:016x}",
        input_ids_L=rng.integers(0, 50, length).astype(np.int32),
        loss_mask_L=loss_mask_L,
        targets=SparseTargets(
            counts_N=counts_N,
            token_ids_E=np.concatenate([np.zeros(0, np.int64), *ids]).astype(np.int32),
            logprobs_E=-rng.integers(1, 9, entries).astype(np.float32),
            inclusion_E=rng.random(entries).astype(np.float32) if inclusion else None,
            temperatures=GRID,
            log_z_NG=rng.random((n, 2)).astype(np.float32),
            entropy_NG=rng.random((n, 2)).astype(np.float32),
            label_logprob_N=-rng.random(n).astype(np.float32),
        ),
    )


@pytest.fixture(scope="session")
def make_source() -> Callable[..., FakeSource]:
    """Give tests `FakeSource`; a fixture, so that no test imports a test."""
    return FakeSource
