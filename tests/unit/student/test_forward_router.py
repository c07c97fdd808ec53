"""The router's auxiliary loss is transformers' own, of whatever way and division into passes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.loss.head import install_distill_head
from pipeline.loss.settings import LossSettings
from pipeline.student.forward.router import router_loss
from pipeline.student.settings.student import StudentSettings
from pipeline.student.training.module import StudentModule
from tests.tiny_families import family_model

T, SPLIT = 12, (5, 7)


def student(model: Any, *, router: bool) -> StudentModule:
    install_distill_head(model, LossSettings())
    loss = router_loss(model, "config", 0.5) if router else None
    return StudentModule(model, loss)


def loss_of(module: StudentModule, supervised: int = 3) -> torch.Tensor:
    ids_1T = (torch.arange(T) * 5 + 1)[None] % 64
    positions_1T = torch.cat([torch.arange(length) for length in SPLIT])[None]
    some_N = torch.arange(supervised)
    loss, _ = module(
        ids_1T, positions_1T, SPLIT, some_N, torch.zeros(supervised, 1, dtype=torch.int64),
        torch.full((supervised, 1), -0.7), None, torch.zeros(supervised), torch.ones(supervised),
        some_N, 1.0,
    )  # fmt: skip
    return loss


@pytest.mark.parametrize("family", ["Qwen3-MoE", "Mixtral"])
@pytest.mark.parametrize("way", ["boundaries", "alone"])
def test_it_is_what_transformers_adds(family: str, way: Any) -> None:
    model = family_model(family)
    ids_1T = (torch.arange(T) * 5 + 1)[None] % 64
    positions_1T = torch.cat([torch.arange(length) for length in SPLIT])[None]
    theirs = model(
        input_ids=ids_1T, position_ids=positions_1T, output_router_logits=True, use_cache=False
    ).aux_loss
    theirs.backward()
    expected = {
        name: 0.5 * p.grad for name, p in model.named_parameters() if p.grad is not None
    }  # fmt: skip
    model.zero_grad()
    with_it, without = student(model, router=True), student(model, router=False)
    with_it.body.way = without.body.way = way
    assert float((loss_of(with_it) - loss_of(without)).detach()) == pytest.approx(
        0.5 * float(theirs.detach()), rel=1e-5
    )
    (loss_of(with_it) - loss_of(without)).backward()
    for name, gradient in expected.items():
        found = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_evaluation_and_idle_ranks_leave_it_out() -> None:
    model = family_model("Mixtral")
    with_it, without = student(model, router=True), student(model, router=False)
    assert float(loss_of(with_it, 0)) == float(loss_of(without, 0))
    with torch.no_grad():
        assert float(loss_of(with_it)) == float(loss_of(without))


def test_it_is_left_out_aloud_and_refused_in_words(caplog: pytest.LogCaptureFixture) -> None:
    model = family_model("Mixtral")
    with caplog.at_level(logging.INFO, "pipeline"):
        assert router_loss(model, "none", None) is None
        assert router_loss(family_model("Llama"), "none", None) is None
    (line,) = [record for record in caplog.records if record.name.startswith("pipeline")]
    assert "the router's auxiliary loss (weight 0.001" in line.getMessage()
    loss = router_loss(model, "config", None)
    assert loss is not None
    assert loss.coefficient == 0.001
    with pytest.raises(ConfigError, match="found config for LlamaForCausalLM"):
        router_loss(family_model("Llama"), "config", None)
    with pytest.raises(ValueError, match=r"found a weight with student\.router_aux_loss none"):
        StudentSettings(router_aux_coefficient=0.1)
