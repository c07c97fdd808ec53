"""A student is refused for what its config, its names and its files say, before it is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError, DistillError, ModelError
from pipeline.loss.settings import LossSettings
from pipeline.models.resolve import most_positions
from pipeline.student.build.check import check_student
from pipeline.student.settings.student import StudentSettings
from pipeline.student.settings.train import TrainSettings
from tests.unit.student.tiny_models import LAYERS, VOCAB, tiny_model


def _check(
    folder: Path,
    *,
    size: int | None = VOCAB,
    on_gpu: bool = False,
    train: dict[str, Any] | None = None,
    **student: Any,
) -> None:
    check_student(
        folder,
        StudentSettings.model_validate(student),
        TrainSettings.model_validate(train or {}),
        LossSettings(),
        vocabulary_size=size,
        on_gpu=on_gpu,
    )


def _refused(kind: type[DistillError], folder: Path, **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        _check(folder, **changes)
    return str(caught.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "smollm3", "gpt2"])
def test_good_students_pass_and_none_is_loaded(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(family, tied=family == "gpt2").save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    _check(tmp_path)
    _check(tmp_path, size=VOCAB - 9, gradient_checkpointing=True)  # a padded head
    _check(tmp_path, keep_layers=(0, 2), freeze=(r"(layers|h)\.1\.",))
    _check(tmp_path, keep_layers=(0, 2), lora={"rank": 2})


def test_patterns_are_matched_with_the_names_of_the_pruned_student(llama: Path) -> None:
    _check(llama, freeze=("layers.5.",))
    message = _refused(ConfigError, llama, freeze=("layers.5.",), keep_layers=(0, 5))
    assert "student.freeze: 'layers.5.' match no parameter; expected names such as" in message
    message = _refused(ConfigError, llama, freeze=("embed", "lm_head", "norm", "layers"))
    assert "every parameter of the student is frozen" in message


def test_a_file_of_patterns(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "spectrum.yaml"
    file.write_text("unfrozen_parameters:\n- layers.1.mlp\n- layers.7.mlp\n- '['\n")
    message = _refused(ConfigError, llama, layers_to_unfreeze=str(file))
    assert message.startswith("2 mistakes in the configuration:")
    assert "'[' is no regular expression" in message
    assert "'layers.7.mlp' match no parameter" in message
    message = _refused(ConfigError, llama, layers_to_unfreeze=str(tmp_path / "gone.yaml"))
    assert "cannot be read" in message


def test_layers_beyond_the_depth(llama: Path) -> None:
    message = _refused(ConfigError, llama, keep_layers=(0, LAYERS))
    assert message.startswith("student.keep_layers: found [6]; expected layers below the model's 6")


@pytest.mark.parametrize("family", ["gemma2", "glm4", "granite"])
def test_layers_that_cannot_be_reconstructed(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    layers = {"keep_layers": (0, 2), "reconstruct": "least_squares"}
    assert "student.reconstruct on" in _refused(ModelError, tmp_path, **layers)


def test_adapters_on_layers_that_are_not_there(llama: Path, monkeypatch: Any) -> None:
    lora = {"rank": 2, "target_modules": ("layers.3.mlp.up_proj",)}
    _check(llama, lora=lora)
    message = _refused(ConfigError, llama, lora=lora, keep_layers=(0, 1))
    assert "found layers.3.mlp.up_proj, which the student does not have" in message
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "peft is not installed" in _refused(ConfigError, llama, lora={"rank": 2})


def test_precision_and_attention_that_this_machine_lacks(llama: Path) -> None:
    message = _refused(ConfigError, llama, train={"fp16": True})
    assert "fp16 on a machine without a GPU" in message
    _check(llama, train={"fp16": True}, on_gpu=True)
    message = _refused(ConfigError, llama, use_flash_attention=True)
    assert "use_flash_attention on a machine without a GPU" in message


def test_flash_attention_in_float32(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    _check(llama, use_flash_attention=True, on_gpu=True)
    message = _refused(
        ConfigError, llama, use_flash_attention=True, on_gpu=True, train={"bf16": False}
    )
    assert "use_flash_attention in float32; expected bfloat16 or float16" in message


def test_an_architecture_without_this_attention(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    _check(tmp_path)  # auto finds one
    message = _refused(ModelError, tmp_path, attention="sdpa")
    assert "transformers cannot load it (MambaForCausalLM does not support an attention" in message


def test_recomputing_what_cannot_be(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    message = _refused(ConfigError, llama, gradient_checkpointing=True)
    assert message.startswith("student.gradient_checkpointing: found true for LlamaForCausalLM")


def test_a_head_with_too_few_rows(llama: Path) -> None:
    message = _refused(ModelError, llama, size=VOCAB + 1)
    assert f"the student's head has {VOCAB} rows; expected at least the vocabulary's 97" in message


@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_weights_of_another_size_than_the_config_says(
    layers: tuple[int, ...] | None, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": VOCAB + 2}))
    message = _refused(ModelError, tmp_path, keep_layers=layers)
    assert "hold model.embed_tokens.weight of shape [96, 32], its config.json says [98" in message


@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_weights_that_are_not_whole(layers: tuple[int, ...] | None, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    _check(tmp_path, keep_layers=layers)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    data = last.read_bytes()
    last.write_bytes(data[:-7])
    message = _refused(ModelError, tmp_path, keep_layers=layers)
    assert re.search(rf"transformers cannot load it \({last.name}: .*", message)
    last.unlink()
    message = _refused(ModelError, tmp_path, keep_layers=layers)
    assert f"{last.name} missing, which model.safetensors.index.json names" in message


def test_no_weights_and_weights_that_cannot_be_pruned(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    assert "no safetensors files" in _refused(ModelError, tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    _check(tmp_path)
    assert "no safetensors files" in _refused(ModelError, tmp_path, keep_layers=(0, 1))


def test_everything_at_once(llama: Path) -> None:
    message = _refused(
        ConfigError,
        llama,
        size=VOCAB + 1,
        train={"fp16": True},
        freeze=("no-such-name",),
        use_flash_attention=True,
    )
    assert message.startswith("4 mistakes in the configuration:")
    for part in ("use_flash_attention on", "fp16 on", "head has 96 rows", "'no-such-name' match"):
        assert part in message


def test_positions_of_configs() -> None:
    assert most_positions({"max_position_embeddings": 64}) == 64
    assert most_positions({"n_positions": 32}) == 32
    assert most_positions({"text_config": {"max_position_embeddings": 8}}) == 8
    assert most_positions({}) is None
