"""What vLLM's processes inherit says the very capture that was asked for."""

from __future__ import annotations

import pytest

from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.quantisation import SAMPLED_QUANTISATION
from pipeline.teacher.engines import vllm_variable
from pipeline.teacher.engines.vllm_variable import CapturePlan, read_variable, set_variable
from pipeline.teacher.sparsify.device import SparseScheme

TEMPERATURES = (1.0, 2.0)


@pytest.mark.parametrize(
    "scheme",
    [
        SparseScheme(9, TEMPERATURES),
        SparseScheme(0, TEMPERATURES, InclusionRule(TEMPERATURES, (1 / 9, 1 / 23.5))),
        SparseScheme(
            4, TEMPERATURES, InclusionRule(TEMPERATURES, (0.1, 0.0)), SAMPLED_QUANTISATION
        ),
    ],
)
def test_the_variable_holds_all_of_the_capture(
    scheme: SparseScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISTILL_VLLM_CAPTURE", raising=False)
    assert not vllm_variable.is_set()
    monkeypatch.setenv("DISTILL_VLLM_CAPTURE", "")  # so that it is removed after the test
    plan = CapturePlan("LlamaForCausalLM", scheme, 128)
    set_variable(plan)
    assert vllm_variable.is_set()
    assert read_variable() == plan
