"""Quantisation of the stored numbers: the step of each, and why it suffices.

A target's error matters where it changes a gradient, so the step of an always-kept entry's log p is
small where p is large and large where p is small. Sampled entries may be coarse: their inclusion
probability is computed from the rounded value, so any step gives unbiased sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["HELDOUT_QUANTISATION", "SAMPLED_QUANTISATION", "Quantisation", "rounding_log_bias"]

Reals = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Quantisation:
    """The constants of all stored numbers; part of the codec's description."""

    always_kept_scale: float = 0.05
    always_kept_step: float = 0.06
    """log p = -scale * expm1(step * k): 0.003 nats at p = 1, 0.06 at p = 0.37, 0.2 at p = 0.05;
    the error of p itself is below 1 % of 1 everywhere."""
    sampled_step: float = 2.0
    """log p = -step * (k + d) with the position's dither d: for any p the rounding is unbiased up
    to a known factor (`rounding_log_bias`). A step of 1 needs 4 % more entries for the same error
    than exact values, and saves 2 bits an entry compared with 1/4."""
    log_z_step: float = 1 / 64
    """log Z: an error of at most 0.8 % of every probability of a position, of either sign."""
    entropy_step: float = 1 / 4
    """Entropy is used only in logged values, which average over thousands of positions; with the
    dither its mean is unbiased. Steps of 1/16, 1/4 take 0.87, 0.6 bytes a token."""
    tail_step: float = 1 / 16
    """-log of the tail's mass: 3 % of the tail at most."""

    def always_kept_values(self) -> NDArray[np.float32]:
        """Return log p of each of 256 codes."""
        k = np.arange(256)
        codes: NDArray[np.float64] = -self.always_kept_scale * np.expm1(self.always_kept_step * k)
        return codes.astype(np.float32)

    def sampled_value(
        self, codes: NDArray[np.uint8], dither: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return log p of sampled entries."""
        return (-(codes.astype(np.float32) + dither)) * np.float32(self.sampled_step)

    def always_kept_code(self, logprobs: Reals) -> NDArray[np.uint8]:
        """Return the code nearest to log p."""
        ratio = np.maximum(-np.asarray(logprobs, np.float64), 0.0) / self.always_kept_scale
        return _code(np.log1p(ratio) / self.always_kept_step)

    def sampled_code(self, logprobs: Reals, dither: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the code of a log p that is on its position's grid already."""
        values = np.asarray(logprobs, np.float64) / -self.sampled_step
        values -= dither
        return _code(values)

    def log_z_code(self, log_z: Reals) -> NDArray[np.int16]:
        """Return log Z as int16 steps, clipped at 512 nats."""
        steps = np.rint(np.asarray(log_z, np.float64) / self.log_z_step)
        return np.clip(steps, -32768, 32767).astype(np.int16)

    def entropy_code(self, entropy: Reals, dither: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the entropy as steps; the largest code is above log 2^19."""
        return _code(np.asarray(entropy, np.float64) / self.entropy_step - dither)

    def entropy_value(
        self, codes: NDArray[np.uint8], dither: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return the entropy, at least half a step below 0: clipping at 0 would bias its mean."""
        return (codes.astype(np.float32) + dither) * np.float32(self.entropy_step)

    def tail_code(self, tail: Reals) -> NDArray[np.uint8]:
        """Return -log of the tail's mass as steps; the last code stands for no mass at all."""
        mass = np.clip(np.asarray(tail, np.float64), 1e-30, 1.0)
        return _code(-np.log(mass) / self.tail_step)

    def tail_values(self) -> NDArray[np.float32]:
        """Return the tail's mass of each of 256 codes."""
        mass: NDArray[np.float64] = np.exp(-np.arange(256) * self.tail_step)
        mass[-1] = 0.0
        return mass.astype(np.float32)

    def mass_units(self) -> NDArray[np.int64]:
        """Return p of each code of always-kept entries in units of 2^-16, rounded."""
        k = np.arange(256)
        p_K = np.exp(-self.always_kept_scale * np.expm1(self.always_kept_step * k))
        units_K: NDArray[np.int64] = np.floor(65536 * p_K + 0.5).astype(np.int64)
        return units_K

    def to_json(self) -> dict[str, float]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Quantisation:
        """Read the JSON form.

        Raises:
            ValueError, TypeError: not a valid description, or a step out of range.
        """
        quantisation = cls(**{name: float(value) for name, value in data.items()})
        steps = quantisation.to_json()
        if not all(1 / 1024 <= value <= 4 for value in steps.values()):
            raise ValueError(f"quantisation {steps}, expected steps of 1/1024 to 4")
        if quantisation.always_kept_step > 0.25:  # the last code must be a finite float32
            raise ValueError(
                f"an always_kept_step of {quantisation.always_kept_step}, expected at most 0.25"
            )
        return quantisation


SAMPLED_QUANTISATION = Quantisation(
    always_kept_step=0.12, sampled_step=1.5, log_z_step=1 / 32, entropy_step=2.0
)
"""For sampled targets. Only p of at least about tau is always kept there: log p is off by at most
0.2 nats (p = 1/30), 0.045 at p = 0.5, which costs 0.001 nats of KL. At 4 % gradient error and T = 1
steps of 1, 1.5, 2, 2.5 of sampled entries take 20.3, 20.3, 20.7, 21.3 bytes a token; for two
temperatures squared error times bytes is 1 and 2 % lower at 1.5 than at 1 and 2. The entropy is
unbiased (dither) and not needed for training: the mean over 10,000 tokens is good to 0.006. Log Z
changes a position's probabilities by 1.6 % at most; sampling changes them by 50 % and more."""

HELDOUT_QUANTISATION = replace(
    SAMPLED_QUANTISATION, always_kept_step=0.03, log_z_step=1 / 64, entropy_step=1 / 4
)
"""For held-out rows whose tail is sampled: they are few, and what they measure is small. The step
of sampled entries is that of all other caches, so that one loss reads both."""


def rounding_log_bias(step: float, temperature: float) -> float:
    """Return log E[exp(e / T)], e the rounding error of a dithered log p: uniform in +-step/2.

    = log(sinh(x) / x), x = step / (2 T) (subtractive dither: Schuchman 1964).
    """
    half = step / (2 * temperature)
    return math.log(math.sinh(half) / half)


def _code(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the nearest of 256 codes; `values` are the caller's own and are overwritten."""
    np.rint(values, out=values)
    return np.clip(values, 0, 255, out=values).astype(np.uint8)
