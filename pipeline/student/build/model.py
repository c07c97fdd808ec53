"""Load a student for training, and the groups of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.models.load import load_causal_lm
from pipeline.student.forward.attention import fit_attention, make_known
from pipeline.student.forward.body import decoder_layers, text_body

__all__ = ["compile_layers", "load_student", "optimizer_groups"]


def load_student(
    folder: Path,
    *,
    dtype: str,
    attention: Sequence[str] = ("sdpa", "eager"),
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Load the student as transformers knows it.

    Args:
        folder: as `save_pretrained` writes it.
        dtype: `float32`, `bfloat16` or `float16`.
        attention: transformers' names, of `attention_order`; the first that serves it is used.
        gradient_checkpointing: recompute activations.
        trust_remote_code: run model code that the folder brings.

    Raises:
        ConfigError: flash attention is asked for and not to be had.
        ModelError: transformers cannot load the folder, or not with this attention.
    """
    make_known(attention)
    model = load_causal_lm(
        folder,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
    )
    fit_attention(model, tuple(attention))
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
    for layer in decoder_layers(model) or [text_body(model)]:
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
