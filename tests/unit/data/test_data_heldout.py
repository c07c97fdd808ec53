"""Held-out rows over ranks: contiguous parts, read ahead, the same scores to the last bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.collate import Batch
from pipeline.data.heldout import heldout_parts
from pipeline.data.stream.heldout_stream import heldout_stream
from pipeline.evaluate.heldout import PartialScores, merge_scores, score_batches
from pipeline.evaluate.measures import HeldoutScores
from pipeline.loss.targets import LossTerms
from tests.unit.data.heldout_batches import heldout_batches

MakeSource = Callable[..., Any]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=20), st.integers(1, 60), st.integers(1, 9))
def test_each_rank_reads_its_share(
    make_source: MakeSource, shard_rows: list[int], tokens: int, world_size: int
) -> None:
    """Every row once, in file order over the ranks; a shard is of one rank, or at a cut."""
    source = make_source(shard_rows)
    ranks = [
        heldout_parts(source, tokens, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [
        (part.shard, row)
        for batches in ranks for parts in batches for part in parts
        for row in range(part.start, part.stop)
    ]  # fmt: skip
    assert rows == [(s, row) for s, count in enumerate(shard_rows) for row in range(count)]
    read = [{part.shard for parts in batches for part in parts} for batches in ranks]
    assert sum(map(len, read)) <= sum(rows > 0 for rows in shard_rows) + world_size - 1


def _forward(batch: Batch) -> LossTerms:
    """Return terms that depend on the batch alone, as a model's do, with all their bits."""
    noise_N = torch.from_numpy(
        np.random.default_rng(batch.label_ids_N.sum().item()).random(batch.num_loss_tokens)
    )
    return LossTerms(
        noise_N.sum(), noise_N, noise_N * 0.7, batch.label_ids_N, (noise_N * 0.9 + 0.05).log()
    )


def _scores(source: Any, world_size: int) -> HeldoutScores:
    def part(rank: int) -> PartialScores:
        batches = heldout_batches(
            source, tokens_per_batch=24, temperature=1.0, rank=rank, world_size=world_size
        )
        return score_batches(batches, _forward)

    return merge_scores([part(rank) for rank in range(world_size)])


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_scores_are_the_same_for_any_number_of_ranks(
    make_source: MakeSource, world_size: int
) -> None:
    """Sums of floats too: they were added up rank by rank, in another order for each number."""
    source = make_source([40, 0, 33, 60, 21])
    alone = _scores(source, 1)
    assert len(alone.sample_ids) > 100
    assert sum(count for _, _, count in alone.confidence_bins) == sum(alone.loss_tokens)
    assert _scores(source, world_size) == alone


def test_calibration_is_of_the_sequences_that_are_scored(make_source: MakeSource) -> None:
    """In a merge of two teachers' caches a sample occurs twice, and can begin two batches."""
    source = make_source([40, 40])
    source.rows[1] = [
        replace(row, sample_id=other.sample_id)
        for row, other in zip(source.rows[1], source.rows[0], strict=True)
    ]
    scores = _scores(source, 1)
    assert len(scores.sample_ids) > 30
    assert sum(count for _, _, count in scores.confidence_bins) == sum(scores.loss_tokens)
    bins_B3, gaps_SB = np.array(scores.confidence_bins), np.array(scores.confidence_gaps)
    np.testing.assert_allclose(bins_B3[:, 0] - bins_B3[:, 1], gaps_SB.sum(0), atol=1e-9)
    for world_size in (2, 3, 5):
        assert _scores(source, world_size) == scores


def test_the_stream_gives_the_same_batches_and_reads_ahead(make_source: MakeSource) -> None:
    source = make_source([9] * 12)
    options = {"tokens_per_batch": 24, "temperature": 1.0, "rank": 1, "world_size": 2}
    expected = [batch.sample_ids for batch in heldout_batches(source, **options)]
    source.reads.clear()
    source.loads.clear()
    source.keep(())
    with heldout_stream(source, **options) as batches:
        first = next(iter(batches))
        deadline = time.monotonic() + 10
        # While the first is scored, the next four are made, and shards opened beyond them.
        while len(source.opened) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        made = len(source.reads)
        assert made > first.num_sequences
        got = [first.sample_ids, *(batch.sample_ids for batch in batches)]
    assert got == expected
    assert source.loads == sorted(source.loads)
    assert min(source.loads) >= 5, "the first half of the shards is the other rank's"
    names = {thread.name for thread in threading.enumerate()}
    assert "data-prefetch" not in names


def test_an_error_of_the_thread_is_raised(make_source: MakeSource) -> None:
    source = make_source([9] * 3)
    source.fail_after = 1
    with (
        pytest.raises(OSError, match="disk is gone"),
        heldout_stream(
            source, tokens_per_batch=24, temperature=1.0, rank=0, world_size=1
        ) as batches,
    ):
        list(batches)
