"""A pruned folder is the model with the other layers deleted, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.errors import ConfigError, ModelError
from pipeline.student.build.prune import prune_model
from tests.unit.student.tiny_models import LAYERS, logits, tiny_model, without_other_layers


def _save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "training_args.bin").write_bytes(b"x")
    return folder


def _load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("kept", [(0, 2, 5), (1,), tuple(range(LAYERS)), (5, 0), (2, 2, 3)])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_pruned_model_is_the_model_without_the_other_layers(
    kept: tuple[int, ...], tied: bool, tmp_path: Path
) -> None:
    model = tiny_model(tied=tied)
    source = _save(model, tmp_path / "source")
    cut = prune_model(source, kept, tmp_path / "cut")
    assert cut == tmp_path / "cut"
    loaded = _load(cut)
    assert loaded.config.num_hidden_layers == len(kept)
    assert torch.equal(logits(loaded), logits(without_other_layers(model, kept)))
    before, after = load_file(source / "model.safetensors"), load_file(cut / "model.safetensors")
    for name, tensor in after.items():
        old = name
        if ".layers." in name:
            new = int(name.split(".")[2])
            old = name.replace(f".layers.{new}.", f".layers.{kept[new]}.")
        assert torch.equal(tensor, before[old])
        assert tensor.dtype == before[old].dtype
    found = {int(name.split(".")[2]) for name in after if ".layers." in name}
    assert found == set(range(len(kept)))
    with safe_open(cut / "model.safetensors", "pt") as reader:
        assert reader.metadata() == {"format": "pt"}


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "smollm3"])
def test_lists_with_a_value_per_layer_are_pruned_too(family: str, tmp_path: Path) -> None:
    kept = (1, 3, 4)
    model = tiny_model(family)
    source = _save(model, tmp_path / "source")
    before = json.loads((source / "config.json").read_text())
    loaded = _load(prune_model(source, kept, tmp_path / "cut"))
    after = json.loads((tmp_path / "cut/config.json").read_text())
    names = ["no_rope_layers"] if family == "smollm3" else ["layer_types"]
    for name in names:
        assert after[name] == [before[name][i] for i in kept]
    wanted = logits(without_other_layers(model, kept))
    assert torch.equal(logits(loaded), wanted)
    # The lists matter: the first three of the unpruned model would be something else.
    other = json.loads((source / "config.json").read_text())
    wrong = {**after, **{name: other[name][: len(kept)] for name in names}}
    (tmp_path / "cut/config.json").write_text(json.dumps(wrong))
    assert not torch.equal(logits(_load(tmp_path / "cut")), wanted)


def test_sharded_files(tmp_path: Path) -> None:
    model, kept = tiny_model(), (0, 3, 5)
    source = _save(model, tmp_path / "source", max_shard_size="20KB")
    files = {file.name for file in source.glob("*.safetensors")}
    assert len(files) > 3
    cut = prune_model(source, kept, tmp_path / "cut")
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    written = {file.name for file in cut.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == written <= files
    tensors = {n: t for name in written for n, t in load_file(cut / name).items()}
    assert set(tensors) == set(index["weight_map"])
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["metadata"]["total_size"] == size
    assert torch.equal(logits(_load(cut)), logits(without_other_layers(model, kept)))


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    source = _save(tiny_model(), tmp_path / "source")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    cut = prune_model(source, (0,), tmp_path / "cut")
    names = {file.name for file in cut.iterdir()}
    assert names == set(before) - {"training_args.bin"}
    assert (cut / "chat_template.jinja").read_text() == "{{ x }}"
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "source"]
    made = (cut / "model.safetensors").stat().st_mtime_ns
    assert prune_model(source, (0,), cut) == cut
    assert (cut / "model.safetensors").stat().st_mtime_ns == made


def test_what_cannot_be_pruned(tmp_path: Path) -> None:
    source = _save(tiny_model(), tmp_path / "source")
    target = tmp_path / "cut"
    with pytest.raises(ConfigError, match=r"keep_layers: found \[6, 9\]; .*below the model's 6"):
        prune_model(source, (0, 6, 9), target)
    weights = source / "model.safetensors"
    tensors = load_file(weights)
    save_file({n: t for n, t in tensors.items() if ".layers.3." not in n}, weights)
    with pytest.raises(ModelError, match=r"no weights of layers \[3\]"):
        prune_model(source, (0, 3), target)
    save_file({f"a.{n}" if ".layers.3." in n else n: t for n, t in tensors.items()}, weights)
    with pytest.raises(ModelError, match="layers under several names"):
        prune_model(source, (0,), target)
    save_file({n.replace(".layers.", ".steps."): t for n, t in tensors.items()}, weights)
    with pytest.raises(ModelError, match="no weights of layers"):
        prune_model(source, (0,), target)
    weights.unlink()
    with pytest.raises(ModelError, match="no safetensors files"):
        prune_model(source, (0,), target)
    (source / "config.json").write_text('{"architectures": ["X"]}')
    with pytest.raises(ModelError, match="gives no number of layers"):
        prune_model(source, (0,), target)
    (source / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config.json"):
        prune_model(source, (0,), target)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
