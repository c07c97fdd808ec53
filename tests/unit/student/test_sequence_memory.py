"""Tiles and offloading change no number; what they keep and how it is forecast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.models.shape import ModelShape
from pipeline.student.costs import activations
from pipeline.student.sequence.memory import dense_mlps, offload_checkpoints, tile_mlps
from pipeline.student.settings.student import StudentSettings
from pipeline.student.settings.train import TrainSettings
from tests.unit.student.tiny_models import LAYERS, VOCAB, tiny_model


def _gradients(model: Any, tokens: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(VOCAB, (1, tokens))
    model.train()
    model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "granite"])
@pytest.mark.parametrize("tokens", [1, 5, 13])
def test_tiles_compute_the_same(family: str, tokens: int) -> None:
    """Also with fewer tokens than tiles, where DeepSpeed's own lose the weights' gradients."""
    expected = _gradients(tiny_model(family), tokens)
    model = tiny_model(family)
    tile_mlps(model, tiles=4)
    calls: list[int] = []
    for mlp in dense_mlps(model):
        mlp.down_proj.register_forward_pre_hook(lambda _m, args: calls.append(args[0].shape[1]))
    found = _gradients(model, tokens)
    assert len(calls) == 2 * 4 * LAYERS, "four tiles, forward and again in the backward pass"
    assert max(calls) == -(-tokens // 4)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, name


def test_a_mixture_of_experts_has_no_tiles() -> None:
    import transformers as hf

    config = hf.Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        head_dim=8, decoder_sparse_step=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="found true for Qwen3MoeForCausalLM, whose layers have"):
        dense_mlps(model)


def test_only_inputs_of_checkpointed_layers_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 9
    expected = _gradients(tiny_model(), tokens)
    saved: list[torch.Size] = []

    class Counted(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, *, pin_memory: bool) -> None:
            assert not pin_memory
            super().__init__(lambda x: saved.append(x.shape) or x.clone(), lambda x: x)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Counted)
    model = tiny_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    offload_checkpoints(model, on_gpu=False)
    found = _gradients(model, tokens)
    assert saved == [torch.Size([1, tokens, 32])] * LAYERS
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, name


SHAPE = ModelShape(
    hidden=1000, layers=10, vocab_size=5000, inner=4000, heads=10, kv_heads=10, head_dim=100,
    tied=True,
)  # fmt: skip


def test_what_is_forecast() -> None:
    def kept(*, checkpointing: bool = True, tokens: int = 8192, **train: Any) -> tuple[int, int]:
        return activations(
            SHAPE, StudentSettings(gradient_checkpointing=checkpointing),
            TrainSettings.model_validate(train), tokens=tokens, element=2,
        )  # fmt: skip

    unit = 8192 * 1000 * 2
    tile = 1000 * 4000 * 2 * 6
    assert kept() == (unit * (10 + 48), 0)
    assert kept(checkpointing=False) == (unit * 10 * 48, 0)
    assert kept(offload_activations=True) == (unit * 48, unit * 10)
    assert kept(tiled_mlp=True) == (unit * (10 + 24) + tile, 0)
    assert kept(tiled_mlp=True, tokens=10) == (10 * 2000 * (10 + 48), 0), "one tile is all of it"
    experts = replace(SHAPE, experts=8, active_experts=2)
    wide = activations(
        experts, StudentSettings(gradient_checkpointing=True), TrainSettings(tiled_mlp=True),
        tokens=8192, element=2,
    )  # fmt: skip
    assert wide.device == unit * (10 + 24 + 2 * 24), "experts are not tiled"
    assert kept(sequence_parallel_size=4, tokens=2048) == (unit // 4 * (10 + 54), 0)
