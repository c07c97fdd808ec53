"""Rows of the cache to one flat batch of torch tensors: position ids restart, no mask, no padding.

Shapes: T tokens of all sequences in a row, N supervised tokens, K entries of the fullest one,
E entries of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.data.mixture.rows import MixedSequence
from pipeline.data.temperature import (
    UncachedTemperature,
    interpolated,
    self_normalised,
    temperature_index,
)

__all__ = ["Batch", "Score", "collate"]


Score = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences laid end to end.

    There is NO attention mask: with `position_ids` that restart, no mask and no key-value cache,
    transformers keeps attention within each sequence; a mask of ones would switch that off.
    """

    input_ids_1T: Tensor
    """int64."""
    position_ids_1T: Tensor
    """int64; 0 at the start of each sequence."""
    label_index_N: Tensor
    """int64; where the hidden state that PREDICTS the supervised token is: its place minus one."""
    label_ids_N: Tensor
    """int64; the supervised tokens themselves."""
    ids_NK: Tensor
    """int64; the teacher's entries, 0 at padding."""
    logprobs_NK: Tensor
    """float32; log p at temperature 1, -inf at padding."""
    inclusion_NK: Tensor | None
    """float32; 1 at padding. None: all entries are always kept."""
    log_z_N: Tensor
    """float32; at `temperature`."""
    entropy_N: Tensor
    """float32; the teacher's, at `temperature`, in nats."""
    label_logprob_N: Tensor
    """float32; the teacher's log p of the supervised token at temperature 1."""
    sample_index_N: Tensor
    """int64; which sequence of the batch the token belongs to."""
    sample_ids: tuple[str, ...]
    """Identity of each sequence."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, on the host; their sum is T. One of 1 token in an empty batch."""
    temperature: float
    written_logprob_N: Tensor | None = None
    """float32; log p of the supervised token, at temperature 1, by the model that wrote it. None:
    not recorded."""
    largest_N: Tensor | None = None
    """int64; the teacher's likeliest token. None: a cache does not know it."""
    teacher_N: Tensor | None = None
    """int64; which cache of a mixture the target is of. None: there is one cache."""
    share_N: Tensor | None = None
    """float32; the part of its position that the target is, where a position has those of several
    teachers; they follow one another, and their shares sum to 1. None: each has one."""
    top_k_N: Tensor | None = None
    """bool; the target is of a top-k, where others of the batch are sampled. None: no such mix."""
    score_N: Tensor | None = None
    """float32; by which the target's token is weighted, where the cache tells. None: it does not.
    """

    @property
    def num_sequences(self) -> int:
        """Sequences; 0 in an empty batch."""
        return len(self.sample_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of sequences; 0 in an empty batch, whose one token is a dummy."""
        return self.input_ids_1T.shape[1] if self.sample_ids else 0

    @property
    def num_loss_tokens(self) -> int:
        """N: targets; more than supervised tokens where these have several teachers."""
        return self.label_index_N.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch with all tensors on a device."""
        tensors: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)


def collate(
    sequences: Sequence[CachedSequence],
    *,
    temperature: float,
    uncached_temperature: UncachedTemperature = "reject",
    score: Score | None = None,
) -> Batch:
    """Join sequences into a batch.

    Without sequences the batch is one dummy token with N = 0, so that a rank without work runs
    the model all the same.

    Args:
        sequences: in order.
        temperature: one that is cached, or see `uncached_temperature`.
        uncached_temperature: what to do at a temperature that is not cached; see
            `pipeline.data.temperature`.
        score: from the entropies at temperature 1 and the label log-probs of targets, by which
            their tokens are weighted; None: not at all.

    Raises:
        ConfigError: the temperature is not cached.
    """
    if not sequences:
        return _empty(temperature)
    taught = [_Taught.of(number, row) for number, row in enumerate(sequences)]
    parts = [part for every in taught for part in every]
    targets = [part.targets for part in parts]
    lengths = [len(sequence.input_ids_L) for sequence in sequences]
    starts = np.cumsum([0, *lengths])
    ids_T = np.concatenate([sequence.input_ids_L for sequence in sequences]).astype(np.int64)
    places = [np.flatnonzero(sequence.loss_mask_L) for sequence in sequences]
    place_N = np.concatenate([places[part.row] + starts[part.row] for part in parts])
    counts_N = np.concatenate([target.counts_N for target in targets])
    sampled = [target.inclusion_E is not None for target in targets]
    ids_NK, logprobs_NK, inclusion_NK = _pad(
        counts_N,
        np.concatenate([target.token_ids_E for target in targets], dtype=np.int64),
        np.concatenate([target.logprobs_E for target in targets]),
        np.concatenate([_inclusion(target) for target in targets]) if any(sampled) else None,
    )
    log_z_N, entropy_N = _normaliser(
        targets, temperature, uncached_temperature, logprobs_NK, inclusion_NK
    )
    positions = [target.num_positions for target in targets]
    mixed = any(isinstance(sequence, MixedSequence) for sequence in sequences)
    several = len(parts) > len(sequences)
    batch = Batch(
        input_ids_1T=torch.from_numpy(ids_T)[None],
        position_ids_1T=torch.from_numpy(np.arange(len(ids_T)) - np.repeat(starts[:-1], lengths))[
            None
        ],
        label_index_N=torch.from_numpy(place_N - 1),
        label_ids_N=torch.from_numpy(ids_T[place_N]),
        ids_NK=torch.from_numpy(ids_NK),
        logprobs_NK=torch.from_numpy(logprobs_NK),
        inclusion_NK=None if inclusion_NK is None else torch.from_numpy(inclusion_NK),
        log_z_N=log_z_N,
        entropy_N=entropy_N,
        label_logprob_N=torch.from_numpy(
            np.concatenate([target.label_logprob_N for target in targets]).astype(np.float32)
        ),
        sample_index_N=_repeated([part.row for part in parts], positions, np.int64),
        sample_ids=tuple(sequence.sample_id for sequence in sequences),
        lengths=tuple(lengths),
        temperature=temperature,
        teacher_N=_repeated([p.teacher for p in parts], positions, np.int64) if mixed else None,
        share_N=_repeated([p.share for p in parts], positions, np.float32) if several else None,
        top_k_N=_repeated([not one for one in sampled], positions, np.bool_)
        if any(sampled) and not all(sampled)
        else None,
        score_N=None if score is None else torch.from_numpy(_scores(targets, score)),
        written_logprob_N=_written(targets),
        largest_N=_largest(targets),
    )
    return _by_place(batch) if several else batch


def _scores(targets: Sequence[SparseTargets], score: Score) -> NDArray[np.float32]:
    return np.concatenate(
        [
            score(
                target.entropy_NG[:, temperature_index(target.temperatures, 1.0)],
                target.label_logprob_N,
            )
            for target in targets
        ]
    )


class _Taught(NamedTuple):
    """The targets of one teacher for one row."""

    row: int
    teacher: int
    share: float
    targets: SparseTargets

    @classmethod
    def of(cls, number: int, row: CachedSequence) -> list[_Taught]:
        """Return those of a row, one for each of its teachers."""
        if not isinstance(row, MixedSequence):
            return [cls(number, 0, 1.0, row.targets)]
        return [cls(number, *part) for part in row.all_targets()]


def _repeated(values: Sequence[Any], times: Sequence[int], dtype: Any) -> Tensor:
    return torch.from_numpy(np.repeat(np.array(values, dtype), times))


def _by_place(batch: Batch) -> Batch:
    """Put the targets of one position next to each other; slices need places that ascend."""
    order_N = torch.argsort(batch.label_index_N, stable=True)
    tokens = batch.num_loss_tokens
    ordered: dict[str, Any] = {
        field.name: value[order_N]
        for field in fields(batch)
        if field.name.endswith(("_N", "_NK"))
        and isinstance(value := getattr(batch, field.name), Tensor)
    }
    assert all(len(value) == tokens for value in ordered.values())
    return replace(batch, **ordered)


def _written(targets: Sequence[SparseTargets]) -> Tensor | None:
    """Return the written log-probs where every sequence has them."""
    known = [t.written_logprob_N for t in targets if t.written_logprob_N is not None]
    return torch.from_numpy(np.concatenate(known)) if len(known) == len(targets) else None


def _largest(targets: Sequence[SparseTargets]) -> Tensor | None:
    """Return the teacher's likeliest tokens where every sequence has them."""
    known = [target.largest_N for target in targets if target.largest_N is not None]
    return (
        torch.from_numpy(np.concatenate(known, dtype=np.int64))
        if len(known) == len(targets)
        else None
    )


def _inclusion(target: SparseTargets) -> NDArray[np.float32]:
    if target.inclusion_E is None:
        return np.ones(len(target.token_ids_E), np.float32)
    return target.inclusion_E


_Padded = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None]


def _pad(
    counts_N: NDArray[np.int32],
    token_ids_E: NDArray[np.int64],
    logprobs_E: NDArray[np.float32],
    inclusion_E: NDArray[np.float32] | None,
) -> _Padded:
    """Lay ragged entries out as [N, K]."""
    tokens, width = len(counts_N), int(counts_N.max(initial=0))
    if len(token_ids_E) == tokens * width:  # nothing to pad, as in a top-k cache
        return (
            token_ids_E.reshape(tokens, width),
            logprobs_E.reshape(tokens, width),
            None if inclusion_E is None else inclusion_E.reshape(tokens, width),
        )
    filled_NK = np.arange(width) < counts_N[:, None]
    ids_NK = np.zeros((tokens, width), np.int64)
    logprobs_NK = np.full((tokens, width), -np.inf, np.float32)
    ids_NK[filled_NK] = token_ids_E
    logprobs_NK[filled_NK] = logprobs_E
    if inclusion_E is None:
        return ids_NK, logprobs_NK, None
    inclusion_NK = np.ones((tokens, width), np.float32)
    inclusion_NK[filled_NK] = inclusion_E
    return ids_NK, logprobs_NK, inclusion_NK


def _normaliser(
    targets: Sequence[SparseTargets],
    temperature: float,
    uncached_temperature: UncachedTemperature,
    logprobs_NK: NDArray[np.float32],
    inclusion_NK: NDArray[np.float32] | None,
) -> tuple[Tensor, Tensor]:
    """Return log Z and entropy of each token at the temperature."""
    grid = targets[0].temperatures
    if any(target.temperatures != grid for target in targets):  # caches of a mixture
        found, start = [], 0
        for target in targets:
            rows = slice(start, start + target.num_positions)
            included = None if inclusion_NK is None else inclusion_NK[rows]
            found.append(
                _normaliser(
                    [target], temperature, uncached_temperature, logprobs_NK[rows], included
                )
            )
            start = rows.stop
        log_z, entropy = zip(*found, strict=True)
        return torch.cat(log_z), torch.cat(entropy)
    if uncached_temperature == "reject" or any(abs(t - temperature) <= 1e-6 * t for t in grid):
        columns = [temperature_index(target.temperatures, temperature) for target in targets]
        return (
            _column([target.log_z_NG for target in targets], columns),
            _column([target.entropy_NG for target in targets], columns),
        )
    if uncached_temperature == "interpolated":
        log_z_NG = np.concatenate([target.log_z_NG for target in targets])
        entropy_NG = np.concatenate([target.entropy_NG for target in targets])
        tables = torch.from_numpy(log_z_NG), torch.from_numpy(entropy_NG)
        return interpolated(grid, temperature, *tables)
    inclusion = None if inclusion_NK is None else torch.from_numpy(inclusion_NK)
    return self_normalised(torch.from_numpy(logprobs_NK), inclusion, temperature)


def _column(tables: Sequence[NDArray[np.float32]], columns: Sequence[int]) -> Tensor:
    picked = [table[:, column] for table, column in zip(tables, columns, strict=True)]
    return torch.from_numpy(np.concatenate(picked).astype(np.float32))


def _empty(temperature: float) -> Batch:
    none, reals = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return Batch(
        input_ids_1T=torch.zeros(1, 1, dtype=torch.int64),
        position_ids_1T=torch.zeros(1, 1, dtype=torch.int64),
        label_index_N=none,
        label_ids_N=none,
        ids_NK=none.reshape(0, 0),
        logprobs_NK=reals.reshape(0, 0),
        inclusion_NK=None,
        log_z_N=reals,
        entropy_N=reals,
        label_logprob_N=reals,
        sample_index_N=none,
        sample_ids=(),
        lengths=(1,),
        temperature=temperature,
        # Of all its 0 tokens they are known: a cache that has them gives such batches as well.
        written_logprob_N=reals,
    )
