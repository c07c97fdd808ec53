"""Reading fewer entries than a cache holds: the largest of a top-k, or an unbiased subsample.

Entries sampled by a rule are subsampled to the rule with every tau `factor` times larger: an entry
of inclusion probability pi is kept with probability pi' / pi, so that its inclusion probability is
pi'. Entries that were always kept and are not under the larger tau are quantised like sampled ones,
with the position's dither. The random numbers are a hash of sample, position and token: every
reader gets the same entries, and those of a larger factor are a subset of those of a smaller one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.spec import CodecSpec, CodedRows, Run
from pipeline.cache.codec.targets import SparseTargets
from pipeline.errors import CacheError
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.noise import dither, mix

__all__ = ["ALL_ENTRIES", "EntryLimit", "as_top_k", "check_limit"]

_TOKENS = 1 << 32
"""Counters from here on, disjoint from those of the dither and of the sampling."""


@dataclass(frozen=True, slots=True)
class EntryLimit:
    """How many entries a reader wants; at most one of the two."""

    top_k: int | None = None
    tau_factor: float | None = None

    def of_coded(
        self,
        coded: CodedRows,
        noise_N: Callable[[], NDArray[np.int64]],
        spec: CodecSpec,
        temperatures: tuple[float, ...],
    ) -> CodedRows:
        """Return the integers with fewer entries; `noise_N` gives each position's random bits."""
        if self.top_k is not None:
            return _largest(coded, self.top_k, spec)
        if self.tau_factor is None or self.tau_factor == 1:
            return coded
        return _subsampled(coded, noise_N(), spec, temperatures, self.tau_factor)

    def of_spec(self, spec: CodecSpec) -> CodecSpec:
        """Return the codec with the inclusion rule of the entries that remain."""
        if self.tau_factor is None or spec.rule is None:
            return spec
        return replace(spec, rule=spec.rule.scaled(self.tau_factor))


ALL_ENTRIES = EntryLimit()


def check_limit(
    limit: EntryLimit, *, rule: InclusionRule | None, held: int | None, url: str
) -> None:
    """Reject a limit that a cache cannot meet.

    Args:
        limit: the requested limit.
        rule: the cache's.
        held: entries per position of a top-k; None where they differ.
        url: the cache, for the message.

    Raises:
        CacheError: more entries than it holds, or a limit for the other kind of cache.
    """
    if limit.top_k is not None:
        if rule is not None:
            raise _no_largest(url)
        if limit.top_k < 1 or (held is not None and limit.top_k > held):
            raise CacheError(
                f"{url}: holds {held} entries a position, {limit.top_k} requested",
                expected=f"a top_k of 1 to {held}",
            )
    if limit.tau_factor is None:
        return
    if rule is None:
        raise CacheError(
            f"{url}: tau_factor {limit.tau_factor:g} requested, but its entries were not sampled",
            expected="top_k to read fewer entries of a top-k cache",
        )
    largest = 1 / max(rule.taus)
    if not 1 <= limit.tau_factor < largest:
        raise CacheError(
            f"{url}: tau_factor {limit.tau_factor:g} requested",
            expected=f"at least 1 (all that it holds) and below {largest:g} (no entry left)",
        )


def as_top_k(targets: SparseTargets, k: int) -> SparseTargets:
    """Return the k largest always-kept entries of sampled targets, as targets of a top-k.

    Of entries that are stored as equal the largest one, where it is known, comes first, then the
    lower id. What was sampled is left out, and so is a label that is not among them.
    """
    assert targets.inclusion_E is not None
    owner_E = np.repeat(np.arange(targets.num_positions), targets.counts_N)
    ids_E = targets.token_ids_E
    other_E = np.ones(len(ids_E), bool)
    if targets.largest_N is not None:
        other_E = ids_E != targets.largest_N[owner_E]
    sampled_E = targets.inclusion_E < 1
    order_E = np.lexsort((ids_E, other_E, -targets.logprobs_E, sampled_E, owner_E))
    kept_E = _first(order_E, targets.counts_N, k) & ~sampled_E
    owner_e, ids_e = owner_E[kept_E], ids_E[kept_E]
    by_id_e = np.lexsort((ids_e, owner_e))
    return replace(
        targets,
        counts_N=np.bincount(owner_e, minlength=targets.num_positions).astype(np.int32),
        token_ids_E=ids_e[by_id_e],
        logprobs_E=targets.logprobs_E[kept_E][by_id_e],
        inclusion_E=None,
        sampled_step=0.0,
        requested_E=None if targets.requested_E is None else targets.requested_E[kept_E][by_id_e],
    )


def _no_largest(what: str) -> CacheError:
    return CacheError(
        f"{what} holds sampled targets, of which the largest entries alone would be biased",
        expected="a cache of a top-k scheme",
        do="subsample with a tau factor instead, which is unbiased",
    )


def _first(
    order_E: NDArray[np.integer[Any]], counts_N: NDArray[np.integer[Any]], k: int
) -> NDArray[np.bool_]:
    """Return which entries are among the first k of their position in an order."""
    first_N = np.cumsum(counts_N) - counts_N
    place_E = np.empty(order_E.size, np.int64)
    place_E[order_E] = np.arange(order_E.size)
    kept_E: NDArray[np.bool_] = place_E - np.repeat(first_N, counts_N) < k
    return kept_E


def _largest(coded: CodedRows, k: int, spec: CodecSpec) -> CodedRows:
    """Keep the k entries of lowest code of each position; of equal ones the lowest ids.

    The largest entry is the first of its equals where it is known.
    """
    run = coded.always_kept
    owner_E = run.of_positions(np.arange(len(run.counts_N)))
    kept_E = _first(
        np.lexsort((run.ids_E, ~_is_largest(coded), run.codes_E, owner_E)), run.counts_N, k
    )
    mass_K = np.exp(spec.quantisation.always_kept_values().astype(np.float64))
    dropped_N = np.bincount(
        owner_E[~kept_E], mass_K[run.codes_E[~kept_E]], minlength=len(run.counts_N)
    )
    tail_N = spec.quantisation.tail_values()[coded.tail_N] + dropped_N
    tail_N = np.where(dropped_N > 0, spec.quantisation.tail_code(tail_N), coded.tail_N)
    return replace(coded, always_kept=run.where(kept_E), tail_N=tail_N.astype(np.uint8))


def _is_largest(coded: CodedRows) -> NDArray[np.bool_]:
    """Return which of the always-kept entries are known to be the largest of their position."""
    run = coded.always_kept
    if coded.largest_N is None:
        return np.zeros(len(run.ids_E), bool)
    is_largest_E: NDArray[np.bool_] = run.ids_E == run.of_positions(coded.largest_N)
    return is_largest_E


def _subsampled(
    coded: CodedRows,
    noise_N: NDArray[np.int64],
    spec: CodecSpec,
    temperatures: tuple[float, ...],
    factor: float,
) -> CodedRows:
    """Subsample the entries of sampled targets; the label, which needs no id, stays."""
    rule, quantisation, run = spec.rule, spec.quantisation, coded.always_kept
    assert rule is not None
    larger = rule.scaled(factor)
    log_z_NG = np.zeros((len(coded.label_N), len(temperatures)))
    log_z_NG[:, [t != 1.0 for t in temperatures]] = coded.log_z_NG * quantisation.log_z_step
    dither_N = dither(noise_N)
    # An entry always kept although the cache's own rule would sample it is of the exact top-k;
    # it stays.
    logprobs_e = quantisation.always_kept_values()[run.codes_E]
    log_z_eG = run.of_positions(log_z_NG)
    leaves_e = (larger.ratio(logprobs_e, log_z_eG) < 1) & (rule.ratio(logprobs_e, log_z_eG) >= 1)
    leaves_e &= ~_is_largest(coded)  # always kept, so that every reader knows it
    stays = run.where(~leaves_e)
    leaves = run.where(leaves_e)
    leaves.codes_E[:] = quantisation.sampled_code(
        logprobs_e[leaves_e], leaves.of_positions(dither_N)
    )
    parts = []
    for candidates, before in ((leaves, None), (coded.sampled, rule)):
        sampled_e = quantisation.sampled_value(
            candidates.codes_E, candidates.of_positions(dither_N)
        )
        log_z_eG = candidates.of_positions(log_z_NG)
        pi_e = larger.inclusion(sampled_e, log_z_eG)
        if before is not None:
            pi_e /= before.inclusion(sampled_e, log_z_eG)
        parts.append(candidates.where(_uniform(candidates, noise_N) < pi_e))
    return replace(coded, always_kept=stays, sampled=_together(*parts))


def _uniform(run: Run, noise_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each entry, by sample, position and token alone."""
    key_e = mix(0, run.of_positions(noise_N))
    bits_e = mix(key_e, run.ids_E.astype(np.int64) + _TOKENS) >> np.uint64(11)
    return bits_e.astype(np.float64) * 2.0**-53


def _together(one: Run, other: Run) -> Run:
    """Return the entries of both, by position."""
    positions = np.arange(len(one.counts_N))
    owner_e = np.concatenate([one.of_positions(positions), other.of_positions(positions)])
    order_e = np.lexsort((np.concatenate([one.ids_E, other.ids_E]), owner_e))
    return Run(
        one.counts_N + other.counts_N,
        np.concatenate([one.ids_E, other.ids_E])[order_e],
        np.concatenate([one.codes_E, other.codes_E])[order_e],
    )
