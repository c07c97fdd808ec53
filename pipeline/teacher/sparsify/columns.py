"""Finished columns, as they leave the device, to the cache's targets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.targets import SparseTargets
from pipeline.corpus.sample import WrittenTokens
from pipeline.errors import ModelError
from pipeline.sampling.noise import sample_key
from pipeline.teacher.sparsify.device import SparseScheme
from pipeline.teacher.sparsify.requested import requested_entries
from pipeline.teacher.sparsify.second_phase import Kept, second_phase

__all__ = ["kept_entries", "to_targets"]


def to_targets(
    columns_NC: NDArray[np.float32],
    scheme: SparseScheme,
    *,
    sample_id: str,
    label_N: NDArray[np.integer],
    rows_N: NDArray[np.integer] | None = None,
    written: WrittenTokens | None = None,
) -> tuple[SparseTargets, NDArray[np.float32]]:
    """Turn one sequence's columns into targets and the mass outside the always-kept entries.

    Args:
        columns_NC: from `sparsify` by `scheme.first_phase`; with K more columns where the writer
            named K ids.
        scheme: what is kept.
        sample_id: keys the second draw.
        label_N: the supervised tokens; the first entry of each position of a sampled target.
        rows_N: the position in the sequence that predicts each; needed where the scheme has
            `oversampling`.
        written: what their writer recorded.

    Raises:
        ModelError: the teacher produced NaN or infinite logits; named by sample and position.
    """
    finite_N = np.isfinite(columns_NC).all(axis=1)
    if not finite_N.all():
        where = int(np.flatnonzero(~finite_N)[0])
        raise ModelError(
            f"the teacher's logits of sample {sample_id}, supervised position {where}, "
            "are not finite",
            expected="finite logits",
            do="run the teacher in bfloat16 or float32 (float16 overflows), or drop the sample",
        )
    grid = len(scheme.temperatures)
    start = 2 + 2 * grid
    first, tail_N = scheme.first_phase, columns_NC[:, 1]
    places = first.always_kept_places + first.sampled_places
    ids_NP = columns_NC[:, start : start + places].astype(np.int32)
    stop = start + 2 * places
    values_NP = np.minimum(columns_NC[:, start + places : stop], 0)
    log_z_NG = columns_NC[:, 2 : 2 + grid]
    if scheme.rule is None:
        parts = _always_kept(ids_NP, values_NP)
    elif scheme.oversampling != 1:
        assert rows_N is not None
        kept = second_phase(
            ids_NP, values_NP, log_z_NG, scheme, label_N=label_N,
            label_logprob_N=np.minimum(columns_NC[:, 0], 0), key=sample_key(sample_id),
            rows_N=rows_N,
        )  # fmt: skip
        tail_N = np.minimum(tail_N + kept.left_N, 1)
        parts = _in_runs(kept, columns_NC[:, 0], label_N)
    else:
        parts = _sampled(ids_NP, values_NP, scheme, columns_NC[:, 0], label_N, log_z_NG)
    counts_N, ids_E, values_E, inclusion_E = parts
    largest_N = None
    if scheme.keeps_largest:
        split = first.always_kept_places
        largest_N = _largest(
            columns_NC[:, start : start + split],
            columns_NC[:, start + places : start + places + split],
            None if scheme.rule is None else columns_NC[:, 0],
            label_N,
        )
    targets = SparseTargets(
        counts_N=counts_N,
        token_ids_E=ids_E,
        logprobs_E=values_E,
        inclusion_E=inclusion_E,
        temperatures=scheme.temperatures,
        log_z_NG=log_z_NG,
        entropy_NG=np.maximum(columns_NC[:, 2 + grid : start], 0),
        label_logprob_N=columns_NC[:, 0],
        sampled_step=0.0 if scheme.rule is None else scheme.quantisation.sampled_step,
        largest_N=largest_N,
        written_logprob_N=None if written is None else written.logprobs_N,
        requested=None
        if written is None or written.top_ids_NK is None
        else requested_entries(written.top_ids_NK, columns_NC[:, stop:]),
    )
    return targets, tail_N


def kept_entries(columns_NC: NDArray[np.float32], scheme: SparseScheme) -> float:
    """Return the mean entries of a position, the label token of a scheme with a rule included."""
    start = 2 + 2 * len(scheme.temperatures)
    places = scheme.always_kept_places + scheme.sampled_places
    kept = int((columns_NC[:, start : start + places] >= 0).sum())
    return kept / max(len(columns_NC), 1) + (scheme.rule is not None)


_Parts = tuple[
    NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32] | None
]


def _largest(
    ids_NK: NDArray[np.float32],
    values_NK: NDArray[np.float32],
    label_logprob_N: NDArray[np.float32] | None,
    label_N: NDArray[np.integer],
) -> NDArray[np.int32]:
    """Return the ids of the largest always-kept entries; of equal ones of the first place.

    Args:
        ids_NK: of the always-kept places; -1 in an empty one.
        values_NK: log p.
        label_logprob_N: of the label, where it is an entry without a place.
        label_N: its id.
    """
    values_NK = np.where(ids_NK >= 0, values_NK, -np.inf)
    place_N1 = values_NK.argmax(axis=1)[:, None]
    ids_N = np.take_along_axis(ids_NK, place_N1, axis=1)[:, 0].astype(np.int32)
    if label_logprob_N is None:
        return ids_N
    best_N = np.take_along_axis(values_NK, place_N1, axis=1)[:, 0]
    return np.where(label_logprob_N >= best_N, label_N, ids_N).astype(np.int32)


def _always_kept(ids_NK: NDArray[np.int32], values_NK: NDArray[np.float32]) -> _Parts:
    order_NK = np.argsort(ids_NK, axis=1, kind="stable")
    return (
        np.full(len(ids_NK), ids_NK.shape[1], np.int32),
        np.take_along_axis(ids_NK, order_NK, axis=1).reshape(-1),
        np.take_along_axis(values_NK, order_NK, axis=1).reshape(-1),
        None,
    )


def _in_runs(
    kept: Kept, label_logprob_N: NDArray[np.float32], label_N: NDArray[np.integer]
) -> _Parts:
    """Label first, then the other always-kept ones, then the sampled ones, each run ascending."""
    count = len(label_N)
    position_E = np.concatenate([np.arange(count), kept.position_E])
    ids_E = np.concatenate([label_N.astype(np.int32), kept.ids_E])
    values_E = np.concatenate([np.minimum(label_logprob_N, 0), kept.logprobs_E])
    inclusion_E = np.concatenate([np.ones(count, np.float32), kept.inclusion_E])
    label_first_E = np.arange(len(ids_E)) >= count
    order_E = np.lexsort((ids_E, inclusion_E < 1, label_first_E, position_E))
    counts_N = np.bincount(position_E, minlength=count).astype(np.int32)
    return counts_N, ids_E[order_E], values_E[order_E], inclusion_E[order_E]


def _sampled(
    ids_NP: NDArray[np.int32],
    values_NP: NDArray[np.float32],
    scheme: SparseScheme,
    label_logprob_N: NDArray[np.float32],
    label_N: NDArray[np.integer],
    log_z_NG: NDArray[np.float32],
) -> _Parts:
    """Label first, then the other always-kept ones, then the sampled ones, each run ascending."""
    rule, split = scheme.rule, scheme.always_kept_places
    assert rule is not None
    order_NK = np.argsort(ids_NP[:, :split], axis=1, kind="stable")
    ids_NP[:, :split] = np.take_along_axis(ids_NP[:, :split], order_NK, axis=1)
    values_NP[:, :split] = np.take_along_axis(values_NP[:, :split], order_NK, axis=1)
    ids_NP = np.concatenate([label_N[:, None].astype(np.int32), ids_NP], axis=1)
    values_NP = np.concatenate([np.minimum(label_logprob_N, 0)[:, None], values_NP], axis=1)
    filled_NP = ids_NP >= 0
    sampled_NP = np.zeros_like(filled_NP)
    sampled_NP[:, split + 1 :] = filled_NP[:, split + 1 :]
    counts_N = filled_NP.sum(axis=1).astype(np.int32)
    sampled_E = sampled_NP[filled_NP]
    values_E = values_NP[filled_NP].astype(np.float32)
    inclusion_E = np.ones(len(values_E), np.float32)
    log_z_EG = np.repeat(log_z_NG, counts_N, axis=0)[sampled_E]
    inclusion_E[sampled_E] = rule.inclusion(values_E[sampled_E], log_z_EG)
    return counts_N, ids_NP[filled_NP], values_E, inclusion_E
