"""Shards of made-up samples, their source, and an engine that answers with zeros."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.corpus.prepared.summary import SampleTotals
from pipeline.corpus.sample import Sample
from pipeline.teacher.capture.plan import PlannedShard
from pipeline.teacher.sparsify.device import SparseScheme

ROWS, TOKENS = 3, 10
SCHEME = SparseScheme(1, (1.0,))


@dataclass(frozen=True)
class Listed:
    """The samples of a shard."""

    rows: list[Sample]

    source_xxh3_128 = ""

    @property
    def num_tokens(self) -> int:
        return sum(row.input_ids.size for row in self.rows)

    def samples(self) -> list[Sample]:
        return self.rows


def shards_of(count: int) -> tuple[PlannedShard, ...]:
    def sample(shard: int, row: int) -> Sample:
        loss_mask = np.arange(TOKENS) > 3
        return Sample(
            row_id(shard, row), "train", np.arange(TOKENS, dtype=np.int32), loss_mask, 0, row
        )

    return tuple(
        PlannedShard(
            "train",
            index,
            Listed([sample(index, row) for row in range(ROWS)]),
        )
        for index in range(count)
    )


def row_id(shard: int, row: int) -> str:
    return f"{shard:016x}{row:016x}"


class Source:
    """All shards, from the beginning."""

    is_complete = True

    def __init__(self, shards: tuple[PlannedShard, ...]) -> None:
        self.shards = shards

    def refresh(self) -> bool:
        return False

    def projected(self) -> SampleTotals:
        rows = sum(len(shard.samples) for shard in self.shards)
        return SampleTotals(rows, rows * TOKENS, rows)


class Engine:
    """Answers with zeros; NaN or an error for some rows; notes when its calls ran."""

    vocab_size = 32
    attention = "none"

    def __init__(self, seconds: float = 0.0, *, nan: Any = (), raises: Any = ()) -> None:
        self.seconds = seconds
        self.nan, self.raises = set(nan), set(raises)
        self.spans: list[tuple[float, float]] = []
        self.calls = 0

    def capture(self, requests: Any, *, on_tokens: Callable[[int], None] | None = None) -> Any:
        self.calls += 1
        begun = time.monotonic()
        time.sleep(self.seconds)
        self.spans.append((begun, time.monotonic()))
        if any(request.sample_id in self.raises for request in requests):
            raise RuntimeError("index out of range")
        if on_tokens is not None:
            on_tokens(sum(r.input_ids_L.size for r in requests))
        fill = [np.nan if r.sample_id in self.nan else 0 for r in requests]
        shapes = [(r.rows_N.size, SCHEME.num_columns) for r in requests]
        return [np.full(s, value, np.float32) for s, value in zip(shapes, fill, strict=True)]

    def close(self) -> None:
        return
