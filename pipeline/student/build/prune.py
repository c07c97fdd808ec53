"""Prune a model folder to chosen decoder layers; everything else stays unchanged."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, ModelError
from pipeline.models.resolve import read_model_config

__all__ = ["check_stack", "prune_model", "pruned_config"]

# The index of a decoder layer in a parameter's name: model.layers.7., transformer.h.7., ...
_LAYER = re.compile(r"^(?P<head>(?:.*?\.)?(?:layers|h|blocks)\.)(?P<index>\d+)(?P<rest>\..+)$")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


def prune_model(source: Path, keep_layers: Sequence[int], target: Path) -> Path:
    """Write `target`: `source` with the decoder layers `keep_layers`, renumbered in that order.

    Works on the safetensors files one by one, without building the model, so that memory stays at
    what is kept of one file. Written beside and renamed: `target` is complete or not there.

    Raises:
        ConfigError: a layer the model does not have.
        ModelError: no safetensors, or layers under names this cannot recognise.
    """
    if (target / "config.json").exists():
        return target
    config = pruned_config(source, keep_layers)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    temporary.mkdir(parents=True)
    try:
        _copy_tensors(source, temporary, list(keep_layers))
        _write_json(temporary / "config.json", config)
        for file in sorted(source.iterdir()):
            keep = file.suffix in (".json", ".jinja", ".model", ".txt", ".py")
            if keep and not file.name.endswith(".index.json") and file.name != "config.json":
                shutil.copyfile(file, temporary / file.name)
        temporary.rename(target)
    except OSError:
        if not (target / "config.json").exists():  # else another process made it meanwhile
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def pruned_config(source: Path, keep_layers: Sequence[int]) -> dict[str, Any]:
    """Return the config.json of `source` with the decoder layers `keep_layers` alone.

    Raises:
        ConfigError: a layer the model does not have.
        ModelError: no number of layers in it.
    """
    config = read_model_config(source)
    inner = config.get("text_config", config)
    key = next((name for name in _COUNTS if name in inner), None)
    if key is None:
        raise ModelError(
            f"{source}: config.json gives no number of layers", expected=" or ".join(_COUNTS)
        )
    count = int(inner[key])
    beyond = [layer for layer in keep_layers if layer >= count]
    if beyond:
        raise ConfigError(
            f"student.keep_layers: found {beyond}", expected=f"layers below the model's {count}"
        )
    inner[key] = len(keep_layers)
    for name, value in inner.items():
        # One value per layer, as in Gemma's and Qwen's layer_types, SmolLM3's no_rope_layers.
        if isinstance(value, list) and len(value) == count and "layer" in name:
            inner[name] = [value[layer] for layer in keep_layers]
    return config


def check_stack(names: Iterable[str], keep_layers: Sequence[int], source: Path) -> None:
    """Reject weights in which the decoder layers cannot be told by their names.

    Args:
        names: of all tensors of the model.
        keep_layers: that are to be kept.
        source: the model's folder, for messages.

    Raises:
        ModelError: no weights of a layer, or layers under several names.
    """
    matches = [match for name in names if (match := _LAYER.match(name))]
    heads = {match["head"] for match in matches}
    missing = set(keep_layers) - {int(match["index"]) for match in matches}
    if len(heads) > 1:
        raise ModelError(
            f"{source}: layers under several names ({', '.join(sorted(heads))})",
            expected="one stack of decoder layers",
        )
    if missing:
        raise ModelError(
            f"{source}: no weights of layers {sorted(missing)} were found",
            expected="parameters named ...layers.N... or ...h.N...",
        )


def _copy_tensors(source: Path, target: Path, keep_layers: list[int]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{source}: no safetensors files", expected="weights as save_pretrained writes"
        )
    index: dict[str, str] = {}
    names: list[str] = []
    size = 0
    for file in files:
        tensors: dict[str, Any] = {}
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - not a mapping
                names.append(name)
                match = _LAYER.match(name)
                if match is None:
                    tensors[name] = reader.get_tensor(name)
                    continue
                for new, old in enumerate(keep_layers):
                    if old == int(match["index"]):
                        # A copy: a layer kept twice must not share memory, or it is not saved.
                        copied = reader.get_tensor(name).clone()
                        tensors[f"{match['head']}{new}{match['rest']}"] = copied
        if tensors:
            save_file(tensors, target / file.name, metadata={"format": "pt"})
            index.update(dict.fromkeys(tensors, file.name))
            size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    check_stack(names, keep_layers, source)
    if len(files) > 1:
        content = {"metadata": {"total_size": size}, "weight_map": index}
        _write_json(target / "model.safetensors.index.json", content)


def _write_json(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
