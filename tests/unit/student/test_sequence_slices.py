"""Slices of a micro-batch: together they are all of it, and padding is nobody's."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.collate import Batch, collate
from pipeline.student.sequence.groups import SequenceGroup
from pipeline.student.sequence.slices import slice_batch, slice_bounds

PER_TOKEN = ("label_ids_N", "ids_NK", "logprobs_NK", "log_z_N", "entropy_N", "sample_index_N")


def make_batch(masks: list[list[bool]]) -> Batch:
    """Return a batch of sequences whose ids and targets are all different."""
    lengths = [len(mask) for mask in masks]
    tokens = sum(lengths)
    places = [i for i, on in enumerate(on for mask in masks for on in mask) if on]
    owner = [s for s, mask in enumerate(masks) for on in mask if on]
    count = len(places)
    numbers = torch.arange(count)
    return Batch(
        input_ids_1T=torch.arange(100, 100 + tokens)[None],
        position_ids_1T=torch.cat([torch.arange(length) for length in lengths])[None],
        label_index_N=torch.tensor(places, dtype=torch.int64) - 1,
        label_ids_N=torch.tensor(places, dtype=torch.int64) + 100,
        ids_NK=torch.stack([numbers, numbers + 1], 1),
        logprobs_NK=-torch.stack([numbers, numbers + 1], 1).float(),
        inclusion_NK=None,
        log_z_N=numbers.float(),
        entropy_N=numbers.float() + 0.5,
        label_logprob_N=-numbers.float(),
        sample_index_N=torch.tensor(owner, dtype=torch.int64),
        sample_ids=tuple(map(str, range(len(masks)))),
        lengths=tuple(lengths),
        temperature=1.0,
    )


# The first token of a sequence is never supervised: nothing predicts it.
masks = st.lists(
    st.lists(st.booleans(), min_size=0, max_size=12).map(lambda rest: [False, *rest]),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(masks, st.integers(1, 9))
def test_slices_are_the_batch(masks: list[list[bool]], size: int) -> None:
    batch = make_batch(masks)
    slices = [slice_batch(batch, part=part, size=size) for part in range(size)]
    tokens = batch.input_ids_1T.shape[1]
    assert len({part.batch.input_ids_1T.shape for part in slices}) == 1, "all of one size"
    whole = torch.cat([part.batch.input_ids_1T for part in slices], 1)
    positions = torch.cat([part.batch.position_ids_1T for part in slices], 1)
    assert whole.shape[1] % size == 0
    assert 0 <= whole.shape[1] - tokens < size
    assert torch.equal(whole[:, :tokens], batch.input_ids_1T)
    assert torch.equal(positions[:, :tokens], batch.position_ids_1T)
    assert positions[0, tokens:].tolist() == list(range(whole.shape[1] - tokens))
    padding = whole.shape[1] - tokens
    for part in slices:
        rest = (padding,) if padding else ()
        assert part.batch.lengths == (*batch.lengths, *rest), "all sequences, padding last"
        assert part.counts == tuple(other.batch.num_loss_tokens for other in slices)
    for name in PER_TOKEN:
        parts = [getattr(part.batch, name) for part in slices]
        assert torch.equal(torch.cat(parts), getattr(batch, name)), name
    each = whole.shape[1] // size
    for number, part in enumerate(slices):
        index = part.batch.label_index_N
        assert ((index >= 0) & (index < each)).all()
        # The hidden state there predicts the label: its token is the one before the label's.
        before = part.batch.input_ids_1T[0, index]
        assert torch.equal(before + 1, part.batch.label_ids_N)
        assert torch.equal(index + number * each + 1 + 100, part.batch.label_ids_N)


def test_a_pass_without_work_is_sliced_as_well() -> None:
    parts = [slice_batch(collate([], temperature=1.0), part=part, size=4) for part in range(4)]
    assert [part.batch.input_ids_1T.shape for part in parts] == [(1, 1)] * 4
    assert parts[0].batch.lengths == (1, 3)
    assert parts[3].counts == (0, 0, 0, 0)


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_bounds(tokens: int, size: int) -> None:
    bounds = slice_bounds(tokens, size)
    assert len(bounds) == size + 1
    assert len({b - a for a, b in pairwise(bounds)}) == 1
    assert tokens <= bounds[-1] < tokens + size


def test_neighbours_are_a_group() -> None:
    groups = [SequenceGroup.of(rank, size=4, data_size=2) for rank in range(8)]
    assert [group.part for group in groups] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [group.data_rank for group in groups] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert groups[5].members(1) == [4, 5, 6, 7]
