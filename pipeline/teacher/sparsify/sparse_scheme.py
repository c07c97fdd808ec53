"""What is kept of a distribution.

Three schemes behind one type: the k largest entries (top-k); entries sampled by an `InclusionRule`
(threshold); the k largest and a sampled rest (top-k-sampled).

Legend: G temperatures, C columns, K always-kept and D sampled places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from pipeline.sampling.inclusion import MOST_INCLUSION, InclusionRule
from pipeline.sampling.quantisation import Quantisation

__all__ = ["LOWEST_LOG_P", "SparseScheme"]

LOWEST_LOG_P = 40.0
"""Sampled entries' log p ends here, in nats: what lies below counts as if it were there."""
_MOST_CANDIDATES = 256
"""Sum of 1 / tau up to which a device draws more entries than are kept."""


@dataclass(frozen=True, slots=True)
class SparseScheme:
    """What is kept of a distribution, and the temperatures with an exact normaliser."""

    top_k: int
    """Entries kept with certainty because they are the largest; 1 beside a rule: the likeliest
    token, which every cache knows; 0: only the rule decides."""
    temperatures: tuple[float, ...]
    rule: InclusionRule | None = None
    """How the rest is sampled; None: not at all."""
    quantisation: Quantisation = field(default_factory=Quantisation)
    """The rule is evaluated on what is stored, so that readers know the very probability."""
    mean_entries: float | None = None
    """What tau is fitted to (`capture/fit_tau.py`), from `taus_before`; None: not at all."""
    taus_before: tuple[float, ...] = ()
    oversampling: float = 1.0
    """The device draws by taus smaller by this factor, or by less where that is too many entries;
    `second_phase` chooses among them. 1: the device's draw is the only one."""
    heldout: SparseScheme | None = None
    """What is kept of the held-out rows, at the same temperatures; None: the same."""

    def of_split(self, split: str) -> SparseScheme:
        """Return what is kept of one split's rows."""
        return self if self.heldout is None or split != "heldout" else self.heldout

    @property
    def name(self) -> str:
        """`top-k`, `threshold` or `top-k-sampled`."""
        if self.rule is None:
            return "top-k"
        return "top-k-sampled" if self.top_k > 1 else "threshold"

    def to_json(self) -> dict[str, object]:
        """Return the part of the cache's identity that this scheme makes."""
        data: dict[str, object] = {"name": self.name, "temperatures": list(self.temperatures)}
        if self.top_k > 1 or self.rule is None:
            data["top_k"] = self.top_k
        if self.rule is not None:
            data["taus"] = list(self.rule.taus)
            data["oversampling"] = self.oversampling
        if self.mean_entries is not None:
            data["mean_entries"] = self.mean_entries
            data["taus_before"] = list(self.taus_before)
        if self.heldout is not None:
            own = self.heldout.to_json()
            data["heldout"] = {name: own[name] for name in own if name != "temperatures"}
        return data

    @property
    def keeps_largest(self) -> bool:
        """Whether the likeliest token is always kept."""
        return self.top_k > 0

    @property
    def first_phase(self) -> SparseScheme:
        """What a device draws by: the same scheme with smaller taus."""
        if self.rule is None or self.oversampling == 1:
            return self
        fits = _MOST_CANDIDATES / sum(1 / tau for tau in self.rule.taus if tau)
        factor = max(1.0, min(self.oversampling, fits))
        return replace(self, rule=self.rule.scaled(1 / factor), oversampling=1.0)

    @property
    def always_kept_places(self) -> int:
        """K: the k largest and, under an inclusion rule, all whose p is large enough."""
        return max(self.top_k, self.rule.max_always_kept if self.rule else 0)

    @property
    def sampled_places(self) -> int:
        """D: most entries that an inclusion rule can draw at one position."""
        return self.rule.max_sampled(self.quantisation.sampled_step / 2) if self.rule else 0

    @property
    def num_columns(self) -> int:
        """C: label, tail, log Z and entropy per temperature; ids and log-probs of K + D places."""
        return 2 + 2 * len(self.temperatures) + 2 * (self.always_kept_places + self.sampled_places)

    @property
    def step_bits(self) -> int:
        """Bits of an inclusion probability's whole steps: the sums of all of a row fit 31 bits."""
        return 30 - (self.sampled_places + 1).bit_length()

    @property
    def most_steps(self) -> float:
        """Steps of the highest inclusion probability that is not certain."""
        return float(math.floor((1 << self.step_bits) * MOST_INCLUSION))
