"""LoRA students: adapters put in by peft, merged into plain weights for the export.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). The only
file that knows peft.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import ConfigError
from pipeline.program import how_to_install
from pipeline.student.settings.student import LoraSettings

__all__ = ["adapter_files", "add_lora", "check_lora", "merged_state"]

_log = logging.getLogger(__name__)
_ADAPTER = "default"


def check_lora(model: Any, settings: LoraSettings) -> None:
    """Reject adapters that the student cannot have; needs no weights and changes nothing.

    Args:
        model: the student, with its loss in the head.
        settings: with a rank.

    Raises:
        ConfigError: no peft; or every name that matches nothing, with the nearest that are there.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "student.lora.rank: adapters are asked for, but the package peft is not installed",
            expected="stage two's environment",
            do=f"{how_to_install('student')}, or leave student.lora.rank out",
        )
    _targets(model, settings)


def add_lora(model: Any, settings: LoraSettings, *, seed: int) -> None:
    """Put adapters into `model` in place; only they learn from here on.

    Call it after `install_distill_head` on every rank. The model keeps its class and the names of
    its other parts, so that the loss, ZeRO and the export need not know. Under ZeRO 3 the adapters
    are partitioned by `deepspeed.initialize`.

    Args:
        model: a transformers causal language model.
        settings: with a rank.
        seed: of the adapters' random half; the other half is zero, so nothing changes at first.

    Raises:
        ConfigError: a target that is no linear layer of the model.
    """
    import torch
    from peft import inject_adapter_in_model

    targets = _targets(model, settings)
    torch.manual_seed(seed)
    config = _peft_config(settings, targets, transposed=_transposed(model, targets))
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    total = sum(_size(parameter) for parameter in model.parameters())
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable = sum(_size(parameter) for parameter in learns)
    _log.info(
        "LoRA of rank %d on %d layers: %d of %d parameters learn (%.2f %%)",
        settings.rank, len(targets), trainable, total, 100 * trainable / total,
    )  # fmt: skip


def merged_state(model: Any, state: Mapping[str, Any], settings: LoraSettings) -> dict[str, Any]:
    """Return full weights without adapters: W + alpha / rank * B A, summed in float32.

    Args:
        model: with adapters; only its layers' layout is read.
        state: its gathered weights on the CPU, adapters included.
        settings: those of `add_lora`.
    """
    assert settings.rank is not None
    scale = settings.alpha / settings.rank
    merged: dict[str, Any] = {}
    for name, weight in state.items():
        if ".lora_" in name:
            continue
        prefix, layer, leaf = name.rpartition("base_layer.")
        if not layer:
            merged[name] = weight
            continue
        if leaf == "weight":
            a_RI = state[f"{prefix}lora_A.{_ADAPTER}.weight"].float()
            b_OR = state[f"{prefix}lora_B.{_ADAPTER}.weight"].float()
            delta_OI = (b_OR @ a_RI).mul_(scale)
            if _transposed(model, [prefix[:-1]]):
                delta_OI = delta_OI.t()
            weight = (weight.float() + delta_OI).to(weight.dtype)
        merged[prefix + leaf] = weight
    return merged


def adapter_files(
    model: Any, state: Mapping[str, Any], settings: LoraSettings, *, base: str
) -> dict[str, bytes]:
    """Return the adapter as peft, vLLM and others load it: file names and contents.

    Args:
        model: with adapters.
        state: its gathered weights on the CPU.
        settings: those of `add_lora`.
        base: the model folder or hub id that the adapter belongs on.
    """
    from safetensors.torch import save

    weights = {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": weight.contiguous()
        for name, weight in state.items()
        if ".lora_" in name
    }
    targets = _targets(model, settings)
    full = _peft_config(
        settings, _short(model, targets), transposed=_transposed(model, targets)
    ).to_dict()
    config = {key: sorted(v) if isinstance(v, set) else v for key, v in full.items()}
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    return {
        "adapter_model.safetensors": save(weights, metadata={"format": "pt"}),
        "adapter_config.json": json.dumps(config, indent=2, default=str).encode(),
    }


def _peft_config(settings: LoraSettings, targets: Sequence[str], *, transposed: bool) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        # Full names: peft's own rules for short ones would also match parts of other names.
        target_modules=list(targets),
        fan_in_fan_out=transposed,
    )


def _transposed(model: Any, targets: Sequence[str]) -> bool:
    """Whether the layers keep their weights transposed, as GPT-2's do."""
    layer = model.get_submodule(targets[0])
    return bool(getattr(layer, "fan_in_fan_out", type(layer).__name__ == "Conv1D"))


def _targets(model: Any, settings: LoraSettings) -> list[str]:
    """Return the full names of the layers that get an adapter."""
    linear = _linear_layers(model)
    if settings.target_modules == ("all-linear",):
        if not linear:
            raise ConfigError(
                "student.lora.target_modules: found all-linear, but the student has no linear layer"
            )
        return linear
    chosen: set[str] = set()
    mistakes = []
    for target in settings.target_modules:
        hits = [name for name in linear if name == target or name.endswith(f".{target}")]
        chosen.update(hits)
        if not hits:
            mistakes.append(_mistake(model, target, linear))
    if mistakes:
        raise ConfigError(mistakes=mistakes)
    return sorted(chosen)


def _linear_layers(model: Any) -> list[str]:
    """Return the names of the linear layers below the head, sorted."""
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    # Without and with adapters alike: a wrapped layer's name is that of its wrapper.
    linear = sorted({re.sub(r"\.base_layer$", "", name) for name in linear})
    return [n for n in linear if ".lora_" not in n and model.get_submodule(n) is not head]


def _short(model: Any, targets: Sequence[str]) -> list[str]:
    """Return the last parts of the names if they mean the same layers: vLLM reads only those."""
    last = {name.rsplit(".", 1)[-1] for name in targets}
    same = [name for name in _linear_layers(model) if name.rsplit(".", 1)[-1] in last]
    return sorted(last) if same == sorted(targets) else list(targets)


def _mistake(model: Any, target: str, linear: Sequence[str]) -> str:
    found = f"student.lora.target_modules: found {target}"
    names = {name for name, _ in model.named_modules()}
    if any(name == target or name.endswith(f".{target}") for name in names):
        return (
            f"{found}, which is no linear layer inside the student's body; expected one of those "
            "(its head holds the loss and gets no adapter)"
        )
    short = sorted({name.rsplit(".", 1)[-1] for name in linear})
    pool = linear if "." in target else short
    near = difflib.get_close_matches(target, pool, n=3, cutoff=0.4) or short
    return f"{found}, which the student does not have; the nearest are {', '.join(near)}"


def _is_linear(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _size(parameter: Any) -> int:
    # Under ZeRO 3 a parameter is empty here and remembers its size as ds_numel.
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())
