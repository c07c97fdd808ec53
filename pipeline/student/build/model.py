"""Load a student for training, and the groups of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.models.load import load_causal_lm

__all__ = ["compile_layers", "load_student", "optimizer_groups"]


def load_student(
    folder: Path, *, dtype: str, use_flash_attention: bool, gradient_checkpointing: bool,
    trust_remote_code: bool,
) -> Any:  # fmt: skip
    """Load the student as transformers knows it.

    Raises:
        ConfigError: flash attention is asked for and not to be had.
        ModelError: transformers cannot load the folder.
    """
    model = load_causal_lm(
        folder,
        dtype=dtype,
        use_flash_attention=use_flash_attention,
        trust_remote_code=trust_remote_code,
    )
    # Packed rows are told apart by their position ids alone, and only without a cache: with it
    # (transformers' default, also in eval) each sequence would see the ones before it.
    model.config.use_cache = False
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def compile_layers(model: Any) -> None:
    """Let torch compile each decoder layer in place; names and weights stay as they are.

    Layer by layer: the graph of one serves all that are alike. Packs of any length share it.
    """
    from torch import nn

    stacks = [
        module
        for module in model.base_model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    ]
    for layer in stacks[0] if stacks else [model.base_model]:
        layer.compile(dynamic=True)


def optimizer_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trained parameters in two groups: biases and norms get no weight decay."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def is_matrix(parameter: Any) -> bool:
        shape: Mapping[int, int] | Any = getattr(parameter, "ds_shape", None) or parameter.shape
        return len(shape) > 1

    groups = [
        {"params": [p for _, p in learning if is_matrix(p)], "weight_decay": weight_decay},
        {"params": [p for _, p in learning if not is_matrix(p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
