"""Shards of a prepared corpus: the same however far it is known, each sample once, none empty."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.prepared.heldout import BlockSplit
from pipeline.corpus.prepared.summary import SampleTotals
from pipeline.corpus.prepared.view import PlacedBlock
from pipeline.corpus.sample import Sample
from pipeline.teacher.capture.groups import Grouping, GroupReader, GroupShard, cut_lengths


def _block(unit: int, lengths: Sequence[int], split: str) -> PlacedBlock:
    totals = SampleTotals(len(lengths), sum(lengths), len(lengths))
    parts = (totals, SampleTotals()) if split == "train" else (SampleTotals(), totals)
    return PlacedBlock(unit, 0, 0, (f"{unit}", ""), BlockSplit(frozenset(), *parts, False, False))


class View:
    """Samples of given lengths, by block."""

    def __init__(self, lengths: list[list[int]]) -> None:
        self.lengths = lengths
        self.reads: list[int] = []

    def samples(self, block: PlacedBlock, split: Any) -> list[Sample]:
        self.reads.append(block.unit)
        return [
            Sample(
                f"{block.unit:016x}{row:016x}", split, np.zeros(length, np.int32),
                np.ones(length, np.bool_), row, 0,
            )
            for row, length in enumerate(self.lengths[block.unit])
        ]  # fmt: skip


LENGTHS = st.lists(st.lists(st.integers(1, 60), max_size=12), min_size=1, max_size=12)


@given(
    lengths=LENGTHS, shard_tokens=st.integers(1, 400), split=st.sampled_from(["train", "heldout"])
)
@settings(max_examples=200, deadline=None)
def test_each_sample_once_in_order_in_shards_without_gaps(
    lengths: list[list[int]], shard_tokens: int, split: Any
) -> None:
    view: Any = View(lengths)
    grouping, reader = Grouping(split, shard_tokens), GroupReader(view)
    seen: list[Any] = []
    for unit, block in enumerate(lengths):
        grouping.add(_block(unit, block, split))
        assert grouping.groups[: len(seen)] == seen, "what is planned does not change"
        seen = list(grouping.groups)
        for group in seen:
            assert group.totals.tokens >= shard_tokens, "no group is closed too early"
            assert group.totals.tokens - sum(lengths[group.blocks[-1].unit]) < shard_tokens
    grouping.close()
    shards = [
        GroupShard(reader, group, number)
        for group in grouping.groups
        for number in range(group.num_shards)
    ]
    assert [g.first_shard + n for g in grouping.groups for n in range(g.num_shards)] == list(
        range(len(shards))
    )
    samples = [list(shard.samples()) for shard in shards]
    assert all(samples), "no shard is empty"
    ids = [sample.sample_id for part in samples for sample in part]
    assert ids == [
        f"{u:016x}{r:016x}" for u, block in enumerate(lengths) for r in range(len(block))
    ]
    assert sum(shard.num_tokens for shard in shards) == sum(map(sum, lengths))


def test_a_group_is_read_once_for_all_its_shards() -> None:
    view: Any = View([[10] * 40, [10] * 5, [10] * 5])
    grouping, reader = Grouping("train", 100), GroupReader(view)
    for unit, block in enumerate(view.lengths):
        grouping.add(_block(unit, block, "train"))
    shards = [GroupShard(reader, g, n) for g in grouping.groups for n in range(g.num_shards)]
    assert [len(shard.samples()) for shard in shards] == [10, 10, 10, 10, 10]
    assert view.reads == [0, 1, 2]
    assert len({shard.source_xxh3_128 for shard in shards}) == 2


@given(lengths=st.lists(st.integers(1, 900), min_size=1, max_size=60), shards=st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_cut_lengths(lengths: list[int], shards: int) -> None:
    shards = min(shards, len(lengths))
    starts = cut_lengths(lengths, shards)
    assert (starts[0], starts[-1], len(starts)) == (0, len(lengths), shards + 1)
    assert all(a < b for a, b in pairwise(starts))
    if max(lengths) * shards < sum(lengths):
        for number, start in enumerate(starts[:-1]):
            ideal = sum(lengths) * number / shards
            assert abs(sum(lengths[:start]) - ideal) <= max(lengths)


@pytest.mark.parametrize("lengths", [[1000, 1, 1], [1, 1, 1000], [1, 1000, 1]])
def test_no_part_is_empty_beside_a_sample_that_is_larger(lengths: list[int]) -> None:
    assert cut_lengths(lengths, 3) == [0, 1, 2, 3]
