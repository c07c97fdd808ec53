"""The inclusion rule: the probability with which a token of the teacher's tail is kept.

A token that is not always kept is kept with probability

    pi = min(1, sqrt( sum_g (p_g / tau_g)^2 )),   p_g = p^(1/T_g) / Z_g

over the temperatures T_g that the rule covers, of its p as it is STORED: rounded with dither, see
below. A kept token then has the weight p_g / pi.

Why it is unbiased. E[1{kept} p_g / pi] = p_g for any pi > 0 (Horvitz and Thompson 1952). So every
sum over the vocabulary that is linear in p_g is unbiased, at every temperature, covered or not; the
forward KL's gradient on the logits, q - p, is such a sum. Z_g over the WHOLE vocabulary is stored;
a normaliser estimated from the sample would give a ratio of estimates, which is biased.

Why this form. Up to a bounded factor (from the student's hidden state) the variance of the estimate
at T_g is sum_j p_gj^2 (1 / pi_j - 1). Minimising a weighted sum of these variances,
lambda_g each, for a given mean number of entries sum_j pi_j over the WHOLE corpus gives, by
Lagrange, pi_j proportional to sqrt(sum_g lambda_g p_gj^2): one tau_g for all positions, so that a
confident position keeps few entries and a flat one many. With one temperature
this is threshold (Poisson, VarOpt) sampling, pi = min(1, p / tau), with a variance of at most
tau per position: Duffield, Lund and Thorup, "Priority sampling" (2007); Cohen et al., "Stream
sampling for variance-optimal estimation of subset sums" (2009); for language models Anshumann et
al., "Sparse logit sampling" (2025), who draw from p with replacement.

Sampling is systematic (Madow 1949): one random offset per position, steps of 1 along the cumulative
sum of pi. Each token keeps its pi, and the number of kept tokens differs from its mean by less than
one; this removes 4 % of the error at T = 1, compared with independent (Poisson) sampling. The draws
of a position are therefore not independent: neighbours exclude each other, so a variance does not
follow from the pi of one position. In a capture this is the first of two draws; the second,
`pipeline/teacher/sparsify/second_phase.py`, looks at the whole sequence, so that positions of one
sequence are not independent either.

Log p of sampled tokens is stored on a coarse grid with subtractive dither (Schuchman 1964): with d
uniform over a step, the rounded log p is log p + u, u uniform over +-step/2 and independent of p.
pi is evaluated at the ROUNDED value, which the reader has, so the reader divides by the probability
that was used; the mean of p_g over d is too large by the known factor E[exp(u / T_g)], which is
divided out. Which entries are always kept must not depend on d: it is decided by exact p (`ratio`).
Seen from the exact p a token below tau, the only one, at T = 1, is kept on average over d with
probability E[min(1, e^u p / tau)]: p / tau times sinh(h) / h where p e^h <= tau, h = step / 2. At a
step of 1.5 that is 1.10 p / tau, and 0.85 next to tau
(`tests/unit/teacher/test_kept_probability.py`).

Shapes: E entries, G temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CacheError

__all__ = ["MOST_INCLUSION", "InclusionRule"]

MOST_INCLUSION = 1 - 2.0**-20
"""Highest inclusion probability of a sampled entry, so that 1 always means always kept. It changes
a weight by at most a millionth."""


@dataclass(frozen=True, slots=True)
class InclusionRule:
    """One tau for each temperature of the grid; 0 where the rule does not cover it."""

    temperatures: tuple[float, ...]
    taus: tuple[float, ...]

    def __post_init__(self) -> None:
        """Reject taus that keep nothing or give no probability.

        Raises:
            CacheError: lengths differ, a tau is outside [0, 1), or all are 0.
        """
        taus, grid = self.taus, self.temperatures
        if len(taus) != len(grid) or not all(0 <= tau < 1 for tau in taus) or not any(taus):
            raise CacheError(
                f"an inclusion rule with taus {list(taus)} at temperatures {list(grid)}",
                expected="one tau in [0, 1) for each temperature, not all 0",
            )

    @property
    def highest(self) -> float:
        """The highest temperature that the rule covers.

        At a temperature above it pi falls faster than p_T as p goes to 0, so the far tail dominates
        the variance. Below it p_T falls faster than pi, and the rule of the higher temperature
        suffices.
        """
        return max(t for t, tau in zip(self.temperatures, self.taus, strict=True) if tau)

    @property
    def max_always_kept(self) -> int:
        """Upper bound of a position's always-kept entries: the ratios sum to <= sum_g 1 / tau_g."""
        return int(sum(1 / tau for tau in self.taus if tau)) + 1

    def max_sampled(self, log_slack: float) -> int:
        """Upper bound of a position's sampled entries: at most 1 above their mean.

        Args:
            log_slack: by how much log p of ALL tokens of a position may be too large, because they
                are rounded with one dither.
        """
        used = [(t, tau) for t, tau in zip(self.temperatures, self.taus, strict=True) if tau]
        # 1/64 more for log Z, which is quantised as well.
        return int(sum(math.exp(log_slack / t + 1 / 64) / tau for t, tau in used)) + 2

    def inclusion(
        self, logprobs_E: NDArray[np.floating], log_z_EG: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Return pi of sampled entries, at most `MOST_INCLUSION`.

        Args:
            logprobs_E: log p at temperature 1, as stored.
            log_z_EG: log sum_j p_j^(1/T) of the entry's position, as stored.
        """
        pi_E: NDArray[np.float64] = np.minimum(MOST_INCLUSION, self.ratio(logprobs_E, log_z_EG))
        return pi_E

    def ratio(
        self, logprobs_E: NDArray[np.floating], log_z_EG: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Return pi without its limit; an entry whose EXACT p gives 1 or more is always kept."""
        total_E = np.zeros(len(logprobs_E))
        for g, (temperature, tau) in enumerate(zip(self.temperatures, self.taus, strict=True)):
            if tau:
                log_p_E = np.asarray(logprobs_E, np.float64) / temperature - log_z_EG[:, g]
                total_E += np.square(np.exp(log_p_E) / tau)
        ratio_E: NDArray[np.float64] = np.sqrt(total_E)
        return ratio_E

    def scaled(self, factor: float) -> InclusionRule:
        """Return the rule with every tau times `factor`; above 1 it keeps fewer entries."""
        return InclusionRule(self.temperatures, tuple(tau * factor for tau in self.taus))

    @property
    def covered(self) -> tuple[float, ...]:
        """The temperatures that the rule covers."""
        return tuple(t for t, tau in zip(self.temperatures, self.taus, strict=True) if tau)

    def to_json(self) -> dict[str, Sequence[float]]:
        """Return the JSON form."""
        return {"temperatures": list(self.temperatures), "taus": list(self.taus)}

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence[float]]) -> InclusionRule:
        """Read the JSON form.

        Raises:
            CacheError, KeyError, TypeError, ValueError: not a valid rule.
        """
        return cls(
            tuple(float(value) for value in data["temperatures"]),
            tuple(float(value) for value in data["taus"]),
        )
