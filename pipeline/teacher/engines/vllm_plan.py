"""What the capture inside vLLM's processes is to do: an entry of vLLM's `additional_config`.

vLLM hands its configuration to every process and every machine that serves the model, which the
environment does not reach (Ray copies a few variables alone).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.teacher.sparsify.device import SparseScheme

__all__ = ["CapturePlan", "planned_capture"]

_KEY = "distill_capture"


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """What is kept of each row of logits, and how many rows exist at a time."""

    scheme: SparseScheme
    head_rows: int

    def to_config(self) -> dict[str, Any]:
        """Return what `additional_config` of `vllm.LLM` holds, JSON-able."""
        heldout = self.scheme.heldout
        return {
            _KEY: {
                **_described(self.scheme),
                "heldout": None if heldout is None else _described(heldout),
                "head_rows": self.head_rows,
            }
        }


def _described(scheme: SparseScheme) -> dict[str, Any]:
    return {
        "top_k": scheme.top_k,
        "temperatures": list(scheme.temperatures),
        "taus": list(scheme.rule.taus) if scheme.rule else None,
        "quantisation": scheme.quantisation.to_json(),
    }


def planned_capture(additional_config: Any) -> CapturePlan | None:
    """Return the plan that vLLM's configuration holds; None where nothing is captured."""
    if not isinstance(additional_config, Mapping) or _KEY not in additional_config:
        return None
    wanted = additional_config[_KEY]
    heldout = wanted.get("heldout")
    scheme = replace(_scheme(wanted), heldout=None if heldout is None else _scheme(heldout))
    return CapturePlan(scheme, int(wanted["head_rows"]))


def _scheme(wanted: Mapping[str, Any]) -> SparseScheme:
    from pipeline.sampling.inclusion import InclusionRule
    from pipeline.sampling.quantisation import Quantisation
    from pipeline.teacher.sparsify.device import SparseScheme

    temperatures = tuple(map(float, wanted["temperatures"]))
    taus = wanted.get("taus")
    return SparseScheme(
        top_k=int(wanted["top_k"]),
        temperatures=temperatures,
        rule=InclusionRule(temperatures, tuple(map(float, taus))) if taus else None,
        quantisation=Quantisation.from_json(wanted["quantisation"]),
    )
