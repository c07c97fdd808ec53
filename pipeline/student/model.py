"""Load a student, check it against the cache's vocabulary, and join it with the fused loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.models.load import load_causal_lm
from pipeline.models.tokenizer import load_tokenizer, vocabulary_difference

__all__ = [
    "check_vocabulary",
    "compile_layers",
    "load_student",
    "optimizer_groups",
    "valid_vocabulary",
]


def check_vocabulary(student_folder: Path, cache_tokenizer: Any) -> None:
    """Refuse a student whose tokenizer gives the cache's token ids another meaning.

    Raises:
        ModelError: the vocabularies differ; the message says in what.
    """
    wanted = cache_tokenizer.get_vocab()
    found = load_tokenizer(student_folder).get_vocab()
    if found != wanted:
        raise ModelError(
            f"{student_folder}: the student's tokenizer differs from the cache's: "
            f"{vocabulary_difference(wanted, found)}",
            expected=f"the same {len(wanted)} tokens under the same ids",
            do="choose a student of the teacher's family, or make a cache with a teacher of the "
            "student's",
        )


def valid_vocabulary(cache_tokenizer: Any, student_folder: Path) -> int:
    """Return how many head rows are real tokens: ids above are padding and get no mass.

    Raises:
        ModelError: the head is smaller than the vocabulary.
    """
    size = int(max(cache_tokenizer.get_vocab().values())) + 1
    config = json.loads((student_folder / "config.json").read_text(encoding="utf-8"))
    rows = int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    if rows < size:
        raise ModelError(f"{student_folder}: its head has {rows} rows", expected=f"at least {size}")
    return size


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
    """Return the learning parameters in two groups: matrices decay, vectors do not."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def is_matrix(parameter: Any) -> bool:
        shape: Mapping[int, int] | Any = getattr(parameter, "ds_shape", None) or parameter.shape
        return len(shape) > 1

    groups = [
        {"params": [p for _, p in learning if is_matrix(p)], "weight_decay": weight_decay},
        {"params": [p for _, p in learning if not is_matrix(p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
