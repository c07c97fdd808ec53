"""What the capture inside vLLM's processes is to do: they inherit it as an environment variable."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.teacher.sparsify.device import SparseScheme

__all__ = ["CAPTURE_PREFIX", "CapturePlan", "is_set", "read_variable", "set_variable"]

CAPTURE_PREFIX = "DistillCapture"
"""In front of the architecture that the capture model is a variant of."""
_VARIABLE = "DISTILL_VLLM_CAPTURE"


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """The model that captures, and what it keeps."""

    architecture: str
    scheme: SparseScheme
    head_rows: int


def is_set() -> bool:
    """Return whether this project asked for a capture."""
    return _VARIABLE in os.environ


def set_variable(plan: CapturePlan) -> None:
    """Say it to this process and to those that it starts."""
    scheme = plan.scheme
    os.environ[_VARIABLE] = json.dumps(
        {
            "architecture": plan.architecture,
            "top_k": scheme.top_k,
            "temperatures": list(scheme.temperatures),
            "taus": list(scheme.rule.taus) if scheme.rule else None,
            "quantisation": scheme.quantisation.to_json(),
            "head_rows": plan.head_rows,
        }
    )


def read_variable() -> CapturePlan:
    """Return what `set_variable` said."""
    from pipeline.sampling.inclusion import InclusionRule
    from pipeline.sampling.quantisation import Quantisation
    from pipeline.teacher.sparsify.device import SparseScheme

    wanted = json.loads(os.environ[_VARIABLE])
    temperatures = tuple(map(float, wanted["temperatures"]))
    taus = wanted.get("taus")
    scheme = SparseScheme(
        top_k=int(wanted["top_k"]),
        temperatures=temperatures,
        rule=InclusionRule(temperatures, tuple(map(float, taus))) if taus else None,
        quantisation=Quantisation.from_json(wanted["quantisation"]),
    )
    return CapturePlan(str(wanted["architecture"]), scheme, int(wanted["head_rows"]))
