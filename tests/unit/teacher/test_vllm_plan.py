"""What vLLM's configuration tells its processes is the very capture that was asked for."""

from __future__ import annotations

import json

import pytest

from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.quantisation import SAMPLED_QUANTISATION
from pipeline.teacher.engines.vllm_plan import CapturePlan, planned_capture
from pipeline.teacher.sparsify.device import SparseScheme

TEMPERATURES = (1.0, 2.0)


@pytest.mark.parametrize(
    "scheme",
    [
        SparseScheme(9, TEMPERATURES),
        SparseScheme(
            9,
            TEMPERATURES,
            heldout=SparseScheme(9, TEMPERATURES, InclusionRule(TEMPERATURES, (0.1, 0.1))),
        ),
        SparseScheme(0, TEMPERATURES, InclusionRule(TEMPERATURES, (1 / 9, 1 / 23.5))),
        SparseScheme(
            4, TEMPERATURES, InclusionRule(TEMPERATURES, (0.1, 0.0)), SAMPLED_QUANTISATION
        ),
    ],
)
def test_the_configuration_holds_all_of_the_capture(scheme: SparseScheme) -> None:
    plan = CapturePlan(scheme, 128)
    config = {"another": 1} | json.loads(json.dumps(plan.to_config()))
    assert planned_capture(config) == plan


def test_a_configuration_without_it_captures_nothing() -> None:
    assert planned_capture({}) is None
    assert planned_capture(None) is None
    assert planned_capture({"gdn_prefill_backend": "auto"}) is None
