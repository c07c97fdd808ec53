"""Rows in another tokenizer's tokens: positions meet where the same text lies before both."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.data.collate import collate
from pipeline.data.mapped import MappedRows
from pipeline.data.retokenise import Aligner, Pieces, RetokenisedRows, retokenise, student_sizes
from pipeline.errors import ModelError


def _row(ids: Sequence[int], loss_mask: Sequence[int], *, sampled: bool = False) -> CachedSequence:
    """Return a row whose n-th target has entries (100 + n, 200 + n)."""
    loss_mask_L = np.asarray(loss_mask, np.bool_)
    count = int(loss_mask_L.sum())
    numbers = np.arange(count)
    return CachedSequence(
        sample_id="0" * 32,
        input_ids_L=np.asarray(ids, np.int32),
        loss_mask_L=loss_mask_L,
        targets=SparseTargets(
            counts_N=np.full(count, 2, np.int32),
            token_ids_E=np.stack([100 + numbers, 200 + numbers], 1).reshape(-1).astype(np.int32),
            logprobs_E=np.tile(np.log([0.2, 0.7]), count).astype(np.float32),
            inclusion_E=np.ones(2 * count, np.float32) if sampled else None,
            temperatures=(1.0,),
            log_z_NG=np.zeros((count, 1), np.float32),
            entropy_NG=np.ones((count, 1), np.float32),
            label_logprob_N=np.full(count, -1.0, np.float32),
        ),
    )


def _aligner(teacher: Sequence[str | None], student: str, specials: dict[int, int]) -> Aligner:
    """Return one where the teacher's id i has text i, and the student cuts at the bars."""

    def encode(text: str) -> Pieces:
        pieces, left = [], text
        for piece in student.split("|"):
            if piece and left.startswith(piece):
                pieces.append(piece)
                left = left[len(piece) :]
        assert not left, f"{left!r} of {text!r} is not covered by {student!r}"
        return Pieces([1000 + len(piece) for piece in pieces], pieces)

    return Aligner(lambda ids: [teacher[i] for i in ids], encode, specials.get)


def _entries(row: CachedSequence) -> list[list[int]]:
    """Return the first entry of each supervised position, or none."""
    ends = np.cumsum(row.targets.counts_N)
    return [
        row.targets.token_ids_E[end - count : end].tolist()
        for end, count in zip(ends, row.targets.counts_N, strict=True)
    ]


def test_positions_meet_at_the_same_character() -> None:
    teacher = ["the", " num", "bers", " are", " he", "re"]
    aligner = _aligner(teacher, "the| numbers| a|re| here", {})
    found = retokenise(_row(range(6), [0, 1, 1, 1, 1, 1]), aligner)
    assert found.input_ids_L.tolist() == [1003, 1008, 1002, 1002, 1005]
    assert found.loss_mask_L.tolist() == [False, True, True, True, True]
    # " numbers" begins with " num" (target 0), " a" with " are" (2), "re" in the middle of it,
    # " here" with " he" (3).
    assert _entries(found) == [[100, 200], [102, 202], [], [103, 203]]
    assert found.targets.label_logprob_N[[0, 1, 3]].tolist() == [-1.0, -1.0, -1.0]
    assert np.isnan(found.targets.label_logprob_N[2])
    assert found.targets.entropy_NG[:, 0].tolist() == [1.0, 1.0, 0.0, 1.0]


def test_only_supervised_text_counts() -> None:
    teacher = ["ab", "cd", "ef"]
    aligner = _aligner(teacher, "a|bc|d|ef", {})
    found = retokenise(_row(range(3), [0, 1, 0]), aligner)
    # "bc" begins in the prompt, "d" in what counts, but inside the teacher's token.
    assert found.loss_mask_L.tolist() == [False, False, True, False]
    assert _entries(found) == [[]]


def test_special_tokens_map_one_to_one_and_may_vanish() -> None:
    teacher = ["<s>", "<user>", "hi", "<end>", "yo", "<end>"]
    aligner = _aligner(teacher, "<user>|h|i|y|o", {0: -1, 3: 7, 5: 7})
    found = retokenise(_row(range(6), [0, 0, 0, 0, 1, 1]), aligner)
    # "<user>" has no counterpart and is read as text.
    assert found.input_ids_L.tolist() == [1006, 1001, 1001, 7, 1001, 1001, 7]
    assert found.loss_mask_L.tolist() == [False, False, False, False, True, True, True]
    assert _entries(found) == [[100, 200], [], [101, 201]]


def test_a_token_that_ends_inside_a_character_aligns_nothing() -> None:
    # The teacher has the two bytes of one character apart; the student has it whole.
    teacher = ["a", None, "ä", "b"]
    aligner = _aligner(teacher, "a|ä|b", {})
    found = retokenise(_row(range(4), [0, 1, 1, 1]), aligner)
    assert found.loss_mask_L.tolist() == [False, True, True]
    assert _entries(found) == [[100, 200], [102, 202]]


def test_a_tokenizer_that_changes_the_text_has_no_targets() -> None:
    aligner = Aligner(
        lambda ids: [["Ab", "cd"][i] for i in ids],
        lambda _: Pieces([1, 2], ["ab", "cd"]),
        lambda _: None,
    )
    found = retokenise(_row([0, 1], [0, 1]), aligner)
    assert found.loss_mask_L.tolist() == [False, True]
    assert _entries(found) == [[]]


@pytest.mark.parametrize(("label", "kept"), [(0.2, [[5, 6]]), (0.05, [[6]]), (0.7, [[5, 6]])])
def test_of_a_sample_the_head_alone_is_kept(label: float, kept: list[list[int]]) -> None:
    targets = SparseTargets(
        counts_N=np.asarray([3], np.int32),
        token_ids_E=np.asarray([5, 6, 7], np.int32),
        logprobs_E=np.log(np.asarray([label, 0.1, 0.01])).astype(np.float32),
        inclusion_E=np.asarray([1, 1, 0.2], np.float32),
        temperatures=(1.0,),
        log_z_NG=np.zeros((1, 1), np.float32),
        entropy_NG=np.zeros((1, 1), np.float32),
        label_logprob_N=np.zeros(1, np.float32),
    )
    row = CachedSequence(
        "0" * 32, np.asarray([0, 1], np.int32), np.asarray([0, 1], np.bool_), targets
    )
    found = retokenise(row, _aligner(["a", "b"], "a|b", {}))
    assert _entries(found) == kept
    assert found.targets.inclusion_E is None


class _Source:
    def __init__(self, rows: list[CachedSequence]) -> None:
        self.rows = rows

    def shard_rows(self) -> list[int]:
        return [len(self.rows)]

    def shard_sizes(self, _shard: int) -> np.ndarray:
        sizes = [(len(row.input_ids_L), row.targets.num_positions) for row in self.rows]
        return np.asarray(sizes, np.int32)

    def keep(self, shards: Collection[int]) -> None:
        pass

    def shard_name(self, shard: int) -> str:
        return f"shard {shard}"

    def open(self, shard: int) -> None:
        pass

    def reading(self) -> list[str]:
        return []

    def read_rows(self, _shard: int, rows: Sequence[int]) -> list[CachedSequence]:
        return [self.rows[i] for i in rows]


def test_the_sizes_are_those_of_the_rows() -> None:
    texts = ["ab", "cd", "ef"]
    rows = [_row([0, 1, 2], [0, 1, 1]), _row([1, 0], [0, 0]), _row([2, 2, 1, 0], [0, 0, 1, 1])]
    aligner = Aligner(
        lambda ids: [texts[i] for i in ids],
        lambda text: Pieces([len(text[i : i + 3]) for i in range(0, len(text), 3)],
                            [text[i : i + 3] for i in range(0, len(text), 3)]),
        lambda _: None,
    )  # fmt: skip
    sizes = [student_sizes(row.input_ids_L, row.loss_mask_L, aligner) for row in rows]
    source = RetokenisedRows(_Source(rows), aligner, np.asarray(sizes, np.int32))
    read = source.read_rows(0, range(3))
    found = source.shard_sizes(0)
    assert found[:, 0].tolist() == [len(row.input_ids_L) for row in read] == [2, 2, 3]
    assert found[:, 1].tolist() == [row.targets.num_positions for row in read]
    assert [int((row.targets.counts_N > 0).sum()) for row in read] == [0, 0, 1]
    batch = collate(read, temperature=1.0)
    assert batch.num_loss_tokens == int(found[:, 1].sum())
    assert batch.num_tokens == 7


@given(st.text("ab ä", min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_any_two_cuts_of_a_text(text: str, draw: object) -> None:
    def cut() -> list[str]:
        places = sorted(draw.sample(range(1, len(text)), draw.randint(0, len(text) - 1)))  # type: ignore[attr-defined]
        return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]

    teacher, student = cut(), cut()
    row = _row(range(len(teacher)), [0, *[1] * (len(teacher) - 1)])
    aligner = Aligner(
        lambda ids: [teacher[i] for i in ids],
        lambda _: Pieces([len(piece) for piece in student], student),
        lambda _: None,
    )
    found = retokenise(row, aligner)
    starts = np.cumsum([0, *map(len, student)])[:-1]
    begins = dict(zip(np.cumsum([0, *map(len, teacher)])[:-1].tolist(), range(99), strict=False))
    wanted = [
        [100 + begins[s] - 1, 200 + begins[s] - 1] if s in begins else []
        for s in starts[1:].tolist()
        if s >= len(teacher[0])
    ]
    assert _entries(found) == wanted
    sizes = len(found.input_ids_L), found.targets.num_positions
    assert student_sizes(row.input_ids_L, row.loss_mask_L, aligner) == sizes


def test_a_mapped_row_has_the_students_ids_and_says_what_it_lacks() -> None:
    row = _row([0, 1, 2], [0, 1, 1])
    rows = MappedRows(_Source([row]), lambda ids: ids * 2, 500, lambda i: f"piece {i}")
    (found,) = rows.read_rows(0, [0])
    assert found.input_ids_L.tolist() == [0, 2, 4]
    assert found.targets.token_ids_E.tolist() == [200, 400, 202, 402]
    assert rows.shard_sizes(0)[:, 0].tolist() == [3]
    small = MappedRows(_Source([row]), lambda ids: ids * 2, 3, lambda i: f"piece {i}")
    with pytest.raises(ModelError, match=r"holds 'piece 2', which is no piece of the student's"):
        small.read_rows(0, [0])
