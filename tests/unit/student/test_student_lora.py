"""Adapters: where they go, what learns, and that merged weights say what the adapted model says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.loss.head import install_distill_head
from pipeline.loss.settings import LossSettings
from pipeline.student.build.lora import adapter_files, add_lora, check_lora, merged_state
from pipeline.student.settings.student import LoraSettings
from tests.unit.student.tiny_models import LAYERS, logits, tiny_model


def _lora(*targets: str, **values: Any) -> LoraSettings:
    values = {"rank": 3, "alpha": 12, "target_modules": targets or ("all-linear",), **values}
    return LoraSettings(**values)


def _adapted(family: str, settings: LoraSettings, *, tied: bool = False) -> Any:
    """Return a model whose adapters do something."""
    import torch

    model = tiny_model(family, tied=tied)
    install_distill_head(model, LossSettings())
    add_lora(model, settings, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_weights_are_the_adapted_model(family: str, tied: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    settings = _lora()
    base = tiny_model(family, tied=tied)
    model = _adapted(family, settings, tied=tied)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged = merged_state(model, state, settings)
    assert merged.keys() == {name for name, _ in base.named_parameters()}
    plain = AutoModelForCausalLM.from_config(base.config, dtype=torch.float32).eval()
    missing, unexpected = plain.load_state_dict(merged, strict=False)
    assert not unexpected
    assert all("lm_head" in name or "rotary" in name or "bias" in name for name in missing)
    plain.tie_weights()
    assert torch.allclose(logits(plain), logits(model), atol=2e-4)
    assert not torch.allclose(logits(plain), logits(base), atol=0.1), "the adapters did something"


def test_nothing_changes_at_first_and_only_adapters_learn() -> None:
    import torch

    model, base = tiny_model(), tiny_model()
    install_distill_head(model, LossSettings())
    add_lora(model, _lora("q_proj", "down_proj", dropout=0.5), seed=1)
    assert torch.equal(logits(model.eval()), logits(base))
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(learns) == 2 * 2 * LAYERS
    assert all(".q_proj.lora_" in name or ".down_proj.lora_" in name for name in learns)
    again = tiny_model()
    add_lora(again, _lora("q_proj", "down_proj"), seed=1)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), "the same adapters on every rank"


@pytest.mark.parametrize(
    ("targets", "short"), [(("all-linear",), True), (("0.mlp.up_proj",), False)]
)
def test_the_adapter_loads_in_peft(targets: tuple[str, ...], short: bool, tmp_path: Path) -> None:
    import json

    import torch
    from peft import PeftModel

    settings = _lora(*targets)
    model = _adapted("llama", settings)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, data in adapter_files(model, state, settings, base="some/base").items():
        (tmp_path / name).write_bytes(data)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert ("q_proj" in names) == short
    assert names == ["model.layers.0.mlp.up_proj"] or short
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny_model()), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("qproj", "which the student does not have; the nearest are q_proj"),
        ("layers.1.mlp.up_porj", "layers.1.mlp.up_proj"),
        ("zzz", "the nearest are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        ("lm_head", "which is no linear layer inside the student's body"),
        ("embed_tokens", "which is no linear layer inside the student's body"),
    ],
)
def test_bad_targets_are_refused_with_the_nearest(target: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_lora(tiny_model(), _lora("q_proj", target, "wrong"))
    assert said in str(caught.value)
    assert "found wrong" in str(caught.value), "all at once"


def test_good_targets_pass_the_check() -> None:
    check_lora(tiny_model(), _lora("q_proj", "layers.1.mlp.up_proj"))
