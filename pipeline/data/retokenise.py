"""Rows of a cache in the tokens of a student with another tokenizer, for cross-tokenizer losses.

The teacher's ids are decoded and the text is tokenised again. A target carries over where both
tokenizers begin a token at the same character: there both predict what follows the same text. All
other student tokens keep their cross-entropy and have a target without entries.

Shapes: L tokens of the teacher's sequence, M of the student's, C segments, N supervised tokens, E
entries of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.data.source import RowsOver

__all__ = ["Aligner", "Pieces", "RetokenisedRows", "retokenise", "student_sizes"]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Token ids and the text of each."""

    ids: Sequence[int]
    texts: Sequence[str | None]
    """None: the token ends inside a character, whose text comes with a later token."""


@dataclass(frozen=True, slots=True)
class Aligner:
    """The two tokenizers, as far as rows need them."""

    texts: Callable[[Sequence[int]], Sequence[str | None]]
    """The text of each of the teacher's ids; see `Pieces.texts`."""
    encode: Callable[[str], Pieces]
    """The student's tokens of a text without special tokens."""
    special: Callable[[int], int | None]
    """The student's counterpart of a special token of the teacher, by content or by role (begin or
    end of text); None for ordinary tokens and for those without one, which are read as text; -1 for
    those to leave out."""


def retokenise(row: CachedSequence, aligner: Aligner) -> CachedSequence:
    """Return the row in the student's tokens.

    Of sampled targets only the always-kept entries are kept, less a label token that is always kept
    for being label alone: what is left is the head of the sorted distribution, which
    cross-tokenizer losses compare.
    """
    ids, starts, at = _student_tokens(row.input_ids_L, aligner)
    loss_mask_M = _supervised(row.loss_mask_L, at)
    target_of_L = np.cumsum(row.loss_mask_L) - 1
    target_M = np.where(starts, target_of_L[at], -1) if ids else np.zeros(0, np.int64)
    return CachedSequence(
        sample_id=row.sample_id,
        input_ids_L=np.asarray(ids, np.int32),
        loss_mask_L=loss_mask_M,
        targets=_pick(row.targets, target_M[loss_mask_M]),
    )


def student_sizes(
    input_ids_L: NDArray[np.int32], loss_mask_L: NDArray[np.bool_], aligner: Aligner
) -> tuple[int, int]:
    """Return tokens and supervised tokens of a row in the student's tokens; needs no target."""
    ids, _, at = _student_tokens(input_ids_L, aligner)
    return len(ids), int(_supervised(loss_mask_L, at).sum())


@dataclass(frozen=True)
class RetokenisedRows(RowsOver):
    """A `RowSource` over another one."""

    aligner: Aligner
    sizes_R2: NDArray[np.int32]
    """`student_sizes` of every row of all shards."""

    def shard_sizes(self, shard: int) -> NDArray[np.int32]:
        """Return the student's tokens and supervised tokens of every row of a shard."""
        return self.sizes_R2[self._starts[shard] : self._starts[shard + 1]]

    def read_rows(self, shard: int, rows: Sequence[int]) -> list[CachedSequence]:
        """Read and tokenise again."""
        return [retokenise(row, self.aligner) for row in self.source.read_rows(shard, rows)]

    @cached_property
    def _starts(self) -> list[int]:
        starts: list[int] = np.cumsum([0, *self.source.shard_rows()]).tolist()
        return starts


def _supervised(loss_mask_L: NDArray[np.bool_], at: list[int]) -> NDArray[np.bool_]:
    """Return which of the student's tokens are supervised: as the teacher's at their start."""
    loss_mask_M = loss_mask_L[at] if at else np.zeros(0, np.bool_)
    loss_mask_M[:1] = False  # a student's first token predicts nothing, as the teacher's
    return loss_mask_M


def _student_tokens(
    input_ids_L: NDArray[np.int32], aligner: Aligner
) -> tuple[list[int], list[bool], list[int]]:
    """Return for each student token three things.

    Its id, whether a token of the teacher begins where it does, and which of the teacher's tokens
    covers its first character.
    """
    teacher_ids = input_ids_L.tolist()
    texts = aligner.texts(teacher_ids)
    ids: list[int] = []
    starts: list[bool] = []
    at: list[int] = []
    first = 0
    while first < len(teacher_ids):
        special = aligner.special(teacher_ids[first])
        if special is not None:
            if special >= 0:
                ids.append(special)
                starts.append(True)
                at.append(first)
            first += 1
            continue
        last = first
        while last < len(teacher_ids) and aligner.special(teacher_ids[last]) is None:
            last += 1
        segment = texts[first:last]
        text = "".join(part or "" for part in segment)
        whole_T, begin_T = _begins(segment)
        pieces = aligner.encode(text)
        whole_S, begin_S = _begins(pieces.texts)
        # A tokenizer that does not give its text back (it lowers case, it adds a space) has no
        # characters to align by.
        exact = "".join(part or "" for part in pieces.texts) == text
        known = {begin_T[i]: i for i in reversed(range(len(segment))) if whole_T[i]}
        owners = np.searchsorted(begin_T, begin_S, side="right") - 1
        for j, number in enumerate(pieces.ids):
            aligned = exact and whole_S[j] and begin_S[j] in known
            place = known[begin_S[j]] if aligned else int(owners[j])
            ids.append(number)
            starts.append(aligned)
            at.append(first + min(max(place, 0), len(segment) - 1))
        first = last
    return ids, starts, at


def _begins(texts: Sequence[str | None]) -> tuple[list[bool], list[int]]:
    """Return for each token whether it begins between two characters, and at which character."""
    whole, begins, place, complete = [], [], 0, True
    for text in texts:
        whole.append(complete)
        begins.append(place)
        complete = text is not None
        place += len(text or "")
    return whole, begins


def _pick(targets: SparseTargets, chosen_N: NDArray[np.int64]) -> SparseTargets:
    """Return the targets of the chosen positions, in that order; -1 stands for one of no entries.

    Its log Z and entropy are 0, and its label log-probability NaN: nobody knows them.
    """
    kept_E = _head_of_distribution(targets)
    owner_E = np.repeat(np.arange(targets.num_positions), targets.counts_N)[kept_E]
    ids_E, logprobs_E = targets.token_ids_E[kept_E], targets.logprobs_E[kept_E]
    counts_P = np.bincount(owner_E, minlength=targets.num_positions)
    first_P = np.cumsum(counts_P) - counts_P
    there_N = chosen_N >= 0
    safe_N = np.where(there_N, chosen_N, 0)
    if not targets.num_positions:
        counts_N = np.zeros(len(chosen_N), np.int64)
        order_E = np.zeros(0, np.int64)
    else:
        counts_N = np.where(there_N, counts_P[safe_N], 0)
        ranges = [
            np.arange(first_P[n], first_P[n] + count)
            for n, count in zip(safe_N, counts_N, strict=True)
        ]
        order_E = np.concatenate([np.zeros(0, np.int64), *ranges])
    return SparseTargets(
        counts_N=counts_N.astype(np.int32),
        token_ids_E=ids_E[order_E],
        logprobs_E=logprobs_E[order_E],
        inclusion_E=None,
        temperatures=targets.temperatures,
        log_z_NG=_rows(targets.log_z_NG, safe_N, there_N, 0.0),
        entropy_NG=_rows(targets.entropy_NG, safe_N, there_N, 0.0),
        label_logprob_N=_rows(targets.label_logprob_N, safe_N, there_N, np.nan),
    )


def _rows(
    table: NDArray[np.float32], safe_N: NDArray[np.int64], there_N: NDArray[np.bool_], other: float
) -> NDArray[np.float32]:
    if not len(table):
        return np.full((len(safe_N), *table.shape[1:]), other, np.float32)
    picked = table[safe_N].copy()
    picked[~there_N] = other
    return picked


def _head_of_distribution(targets: SparseTargets) -> NDArray[np.bool_]:
    """Return bool [E]: entries that are the largest of their position without a gap."""
    inclusion_E = targets.inclusion_E
    if inclusion_E is None:
        kept_E = np.ones(len(targets.token_ids_E), np.bool_)
        return kept_E if targets.requested_E is None else ~targets.requested_E
    kept_E = inclusion_E >= 1
    if targets.requested_E is not None:  # below them are larger ones that nobody asked for
        kept_E &= ~targets.requested_E
    # The first of each position is the label token, whatever its probability.
    start = 0
    for count in targets.counts_N.tolist():
        others = targets.logprobs_E[start + 1 : start + count][kept_E[start + 1 : start + count]]
        # Alone it may be likely or not: its rank is known only where it has most of the mass.
        least = float(others.min()) if len(others) else np.log(0.5)
        if count and targets.logprobs_E[start] < least:
            kept_E[start] = False
        start += count
    return kept_E
