"""Slices are refused before the weights are loaded where heads, layers or settings forbid them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.student.sequence.check import check_sequence_settings
from pipeline.student.settings.student import StudentSettings
from pipeline.student.settings.train import TrainSettings
from pipeline.student.training.checkpoint import Checkpoints, RunIdentity, fitting_processes

COMMON: dict[str, Any] = {
    "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip


def _model(family: str = "Llama", **changes: Any) -> Any:
    import transformers as hf

    config = getattr(hf, f"{family}Config")(**{**COMMON, **changes})
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(config)


def _check(model: Any, train: dict[str, Any], **student: Any) -> None:
    check_sequence_settings(
        model, StudentSettings.model_validate(student), TrainSettings.model_validate(train)
    )


def _refused(model: Any, train: dict[str, Any], **student: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        _check(model, train, **student)
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 2, 4, 12])
def test_heads_that_divide(size: int) -> None:
    """Twelve slices have four heads of keys: three slices each get the same one."""
    _check(_model(), {"sequence_parallel_size": size})


@pytest.mark.parametrize("size", [3, 5, 6, 8, 24])
def test_heads_that_do_not(size: int) -> None:
    assert _refused(_model(), {"sequence_parallel_size": size}) == (
        f"train.sequence_parallel_size: found {size} for a student of 12 attention heads and 4 of "
        "keys and values; expected a divisor of the heads that divides those of keys and values or "
        "is a multiple of them; choose 1 or 2 or 4 or 12."
    )


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of kind conv"),
        ("FalconH1", {"num_key_value_heads": 2}, "layers of kind hybrid"),
        ("RecurrentGemma", {"lru_width": 48}, "layers with a state"),
        ("Llama4Text", {"num_local_experts": 2}, "layers of kind chunked_attention"),
        ("DeepseekV3", {"n_routed_experts": 8, "n_group": 1, "topk_group": 1}, "latent attention"),
        ("Gemma2", {}, "capped attention scores without flash attention"),
    ],
)
def test_layers_that_need_more_than_their_slice(
    family: str, changes: dict[str, Any], said: str
) -> None:
    model = _model(family, **changes)
    message = _refused(model, {"sequence_parallel_size": 2})
    assert f"found 2 for {type(model).__name__}, which has {said}" in message
    _check(model, {"sequence_parallel_size": 1})


@pytest.mark.parametrize(
    "family", ["Qwen3", "Gemma3Text", "SmolLM3", "Granite", "Olmo3", "Mistral"]
)
def test_families_that_have_slices(family: str) -> None:
    _check(_model(family), {"sequence_parallel_size": 2, "tiled_mlp": True})


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"forward": "alone"}, "with student.forward alone, whose passes of one sequence"),
        ({"attention": "flex"}, "with student.attention flex"),
        ({"router_aux_loss": "config"}, "with student.router_aux_loss config"),
    ],
)
def test_settings_that_go_with_whole_passes_only(student: dict[str, Any], said: str) -> None:
    assert said in _refused(_model(), {"sequence_parallel_size": 2}, **student)
    _check(_model(), {"sequence_parallel_size": 1}, **student)


def test_offloading_needs_checkpoints() -> None:
    message = _refused(_model(), {"offload_activations": True})
    assert message.startswith("train.offload_activations: found true without student.gradient_")
    _check(_model(), {"offload_activations": True}, gradient_checkpointing=True)


@pytest.mark.parametrize("name", ["sequence_parallel_size", "tiled_mlp", "offload_activations"])
def test_compiled_layers_have_none_of_it(name: str) -> None:
    values = {name: 2 if name == "sequence_parallel_size" else True}
    with pytest.raises(ValidationError, match=f"train.{name}: found .* with train.torch_compile"):
        TrainSettings.model_validate({**values, "torch_compile": True})


def test_processes_are_a_multiple() -> None:
    train = TrainSettings(sequence_parallel_size=4)
    assert [train.data_parallel_size(n) for n in (4, 8, 32)] == [1, 2, 8]
    for processes, said in ((6, "6 processes"), (1, "1 process"), (2, "2 processes")):
        with pytest.raises(ConfigError) as caught:
            train.data_parallel_size(processes)
        assert str(caught.value) == (
            f"train.sequence_parallel_size: found 4 with {said}; expected a divisor of the number "
            "of processes; start a multiple of 4 processes, or choose another size."
        )


def test_checkpoints_know_slices(tmp_path: Path) -> None:
    """12 packs a step, by 4 processes in 2 groups: 6 of each group's."""
    identity = RunIdentity({"train": {"packs_per_step": 12}})
    checkpoints = Checkpoints(tmp_path, identity, keep=1, world_size=4, slices=2)
    folder = checkpoints.folder(1)
    folder.mkdir(parents=True)
    checkpoints.mark_complete(1, world_size=4)
    assert json.loads((folder / "complete.json").read_text())["sequence_parallel_size"] == 2
    assert fitting_processes(folder, packs_of_one=6, slices=2) == 4
    assert fitting_processes(folder, packs_of_one=6, slices=4) == 8
    assert fitting_processes(folder, packs_of_one=24, slices=2) is None, "half a group"
    other = RunIdentity({"train": {"packs_per_step": 6}})
    smaller = Checkpoints(tmp_path, other, keep=1, world_size=8, slices=4)
    with pytest.raises(Exception, match=r"to be 6 \(4 processes share a pass\)"):
        smaller.read(folder)
