"""What text does not reach stays as it is; experts that got no token today still learn."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.loss.head import install_distill_head
from pipeline.loss.settings import LossSettings
from pipeline.student.build.freeze import apply_freezing, learning_parameters
from pipeline.student.build.model import optimizer_groups
from pipeline.student.forward.body import text_body
from pipeline.student.forward.reached import branches, unreached_parameters
from pipeline.student.forward.ways import BodyForward
from pipeline.student.settings.student import StudentSettings
from tests.tiny_families import FAMILIES, family_model


def test_a_vision_tower_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model = family_model("Gemma 3 that sees").train()
    install_distill_head(model, LossSettings())
    with caplog.at_level(logging.INFO, "pipeline"):
        apply_freezing(model, StudentSettings())
    lines = [record.getMessage() for record in caplog.records if "not reach" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("model.vision_tower, model.multi_modal_projector: ")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(optimizer_groups(model, weight_decay=0.1), lr=0.1)
    body = BodyForward(text_body(model))
    ids_1T = torch.arange(6)[None]
    for _ in range(2):
        # As under ZeRO, where a parameter without a gradient has one of zeros.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        model.get_output_embeddings()(body(ids_1T, ids_1T, (6,)).hidden_TD).sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        tower = "vision_tower" in name or "projector" in name
        assert torch.equal(parameter, before[name]) == tower, name


def test_nothing_but_a_vision_tower_to_learn_is_refused() -> None:
    model = family_model("Gemma 3 that sees")
    with pytest.raises(ConfigError, match="that text reaches is frozen"):
        learning_parameters(model, StudentSettings(freeze=("language_model", "lm_head")))


def test_layers_that_text_skips_are_found() -> None:
    import transformers

    text: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 2, "cross_attention_layers": [1],
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = transformers.MllamaTextConfig(**text)
    with torch.device("meta"):
        model: Any = transformers.MllamaForCausalLM(config)
    assert branches(model, unreached_parameters(model)) == ["model.layers.1"]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Gemma 3 that sees"])
def test_in_a_model_of_text_everything_is_reached(
    family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    import transformers

    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    assert not unreached_parameters(model)
    assert "Traceback" not in capfd.readouterr().err
