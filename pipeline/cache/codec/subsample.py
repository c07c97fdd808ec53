"""Fewer entries than a cache holds: the largest of a top-k, or a sample thinned without bias.

A sample drawn by a law of taus is thinned to what the law with every tau `factor` times larger
keeps: an entry that was there with probability pi stays with probability pi' / pi, so it is there
with pi' in all. Certain entries that the larger tau would not keep for certain are put on the grid
of drawn values with the position's own dither, as if they had been drawn. The random numbers are a
hash of sample, position and token: everybody gets the same entries, and of two factors the larger
one's are among the smaller one's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.spec import CodecSpec, CodedRows, Run
from pipeline.errors import CacheError
from pipeline.sampling.inclusion import SamplingLaw
from pipeline.sampling.noise import dither, mix

__all__ = ["WHOLE", "Less", "check_less"]

_TOKENS = 1 << 32
"""Counters from here on: apart from those of the dither and of the draw."""


@dataclass(frozen=True, slots=True)
class Less:
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
        return _thinned(coded, noise_N(), spec, temperatures, self.tau_factor)

    def of_spec(self, spec: CodecSpec) -> CodecSpec:
        """Return the codec whose law the entries that are left were drawn by."""
        if self.tau_factor is None or spec.law is None:
            return spec
        return replace(spec, law=spec.law.scaled(self.tau_factor))


WHOLE = Less()


def check_less(less: Less, *, law: SamplingLaw | None, held: int | None, url: str) -> None:
    """Refuse what a cache cannot give.

    Args:
        less: what is asked for.
        law: the cache's.
        held: entries a position of a top-k; None where they differ.
        url: the cache, for the message.

    Raises:
        CacheError: more than it holds, or of the other kind.
    """
    if less.top_k is not None:
        if law is not None:
            raise _no_largest(url)
        if less.top_k < 1 or (held is not None and less.top_k > held):
            raise CacheError(
                f"{url}: holds {held} entries a position, {less.top_k} asked for",
                expected=f"a top_k of 1 to {held}",
            )
    if less.tau_factor is None:
        return
    if law is None:
        raise CacheError(
            f"{url}: tau_factor {less.tau_factor:g} asked for, but nothing in it was drawn",
            expected="top_k to read fewer entries of a top-k cache",
        )
    largest = 1 / max(law.taus)
    if not 1 <= less.tau_factor < largest:
        raise CacheError(
            f"{url}: tau_factor {less.tau_factor:g} asked for",
            expected=f"at least 1 (what it holds) and below {largest:g}, where nothing is left",
        )


def _no_largest(what: str) -> CacheError:
    return CacheError(
        f"{what} holds sampled targets, which have no largest entries to keep",
        expected="a cache of a top-k scheme",
        do="thin a sample with a tau factor instead, which keeps it right on average",
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
    """Keep the k entries of lowest level of each position; of equal ones the lowest ids."""
    run = coded.certain
    owner_E = run.of_positions(np.arange(len(run.counts_N)))
    kept_E = _first(np.lexsort((run.ids_E, run.levels_E, owner_E)), run.counts_N, k)
    mass_K = np.exp(spec.grids.certain_levels().astype(np.float64))
    dropped_N = np.bincount(
        owner_E[~kept_E], mass_K[run.levels_E[~kept_E]], minlength=len(run.counts_N)
    )
    tail_N = spec.grids.tail_levels()[coded.tail_N] + dropped_N
    tail_N = np.where(dropped_N > 0, spec.grids.tail_level(tail_N), coded.tail_N)
    return replace(coded, certain=run.where(kept_E), tail_N=tail_N.astype(np.uint8))


def _thinned(
    coded: CodedRows,
    noise_N: NDArray[np.int64],
    spec: CodecSpec,
    temperatures: tuple[float, ...],
    factor: float,
) -> CodedRows:
    """Thin the entries of a sample; the gold token, which costs nothing, stays."""
    law, grids, run = spec.law, spec.grids, coded.certain
    assert law is not None
    larger = law.scaled(factor)
    log_z_NG = np.zeros((len(coded.gold_N), len(temperatures)))
    log_z_NG[:, [t != 1.0 for t in temperatures]] = coded.log_z_NG * grids.log_z_step
    dither_N = dither(noise_N)
    # A certain entry that the cache's own law would not keep for certain is of its exact top-k.
    logprobs_e = grids.certain_levels()[run.levels_E]
    log_z_eG = run.of_positions(log_z_NG)
    leaves_e = (larger.ratio(logprobs_e, log_z_eG) < 1) & (law.ratio(logprobs_e, log_z_eG) >= 1)
    stays = run.where(~leaves_e)
    leaves = run.where(leaves_e)
    leaves.levels_E[:] = grids.drawn_level(logprobs_e[leaves_e], leaves.of_positions(dither_N))
    parts = []
    for candidates, before in ((leaves, None), (coded.drawn, law)):
        drawn_e = grids.drawn_value(candidates.levels_E, candidates.of_positions(dither_N))
        log_z_eG = candidates.of_positions(log_z_NG)
        pi_e = larger.inclusion(drawn_e, log_z_eG)
        if before is not None:
            pi_e /= before.inclusion(drawn_e, log_z_eG)
        parts.append(candidates.where(_uniform(candidates, noise_N) < pi_e))
    return replace(coded, certain=stays, drawn=_together(*parts))


def _uniform(run: Run, noise_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each entry, by sample, position and token alone."""
    key_e = mix(0, run.of_positions(noise_N))
    bits_e = mix(key_e, run.ids_E.astype(np.int64) + _TOKENS) >> np.uint64(11)
    return bits_e.astype(np.float64) * 2.0**-53


def _together(one: Run, other: Run) -> Run:
    """Return the entries of both, position by position."""
    positions = np.arange(len(one.counts_N))
    owner_e = np.concatenate([one.of_positions(positions), other.of_positions(positions)])
    order_e = np.lexsort((np.concatenate([one.ids_E, other.ids_E]), owner_e))
    return Run(
        one.counts_N + other.counts_N,
        np.concatenate([one.ids_E, other.ids_E])[order_e],
        np.concatenate([one.levels_E, other.levels_E])[order_e],
    )
