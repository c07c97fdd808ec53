"""What can be said against slices of a student's sequences, from its config and its modules."""

from __future__ import annotations

from typing import Any

from pipeline.errors import ConfigError, Mistakes
from pipeline.student.forward.body import text_body, text_config
from pipeline.student.sequence.memory import dense_mlps
from pipeline.student.settings.sequence import SequenceSettings
from pipeline.student.settings.student import StudentSettings

__all__ = ["check_sequence_settings"]

_WITHIN_ATTENTION = ("full_attention", "sliding_attention")


def check_sequence_settings(model: Any, settings: StudentSettings, train: SequenceSettings) -> None:
    """Reject slices, tiles and offloading that this student cannot have.

    Args:
        model: of transformers; its weights are not looked at.
        settings: of the student.
        train: sizes and options.

    Raises:
        ConfigError: heads that do not divide, layers that need the whole sequence, an attention
            that is not transformers' own, or settings without effect.
    """
    mistakes = Mistakes()
    if train.sequence_parallel_size > 1:
        for option, value, unfit, why in (
            ("forward", settings.forward, "alone", "whose passes of one sequence have no slices"),
            ("attention", settings.attention, "flex", "whose masks are those of a slice"),
            ("router_aux_loss", settings.router_aux_loss, "config", "which needs whole passes"),
        ):
            if value == unfit:
                mistakes.add(
                    f"train.sequence_parallel_size: found {train.sequence_parallel_size} with "
                    f"student.{option} {value}, {why}; expected one of the two"
                )
        with mistakes.collected():
            _check_heads(model, train.sequence_parallel_size)
        with mistakes.collected():
            _check_layers(
                model, train.sequence_parallel_size, flash=settings.chosen_attention == "flash"
            )
    if train.tiled_mlp:
        with mistakes.collected():
            dense_mlps(model)
    if train.offload_activations and not settings.gradient_checkpointing:
        mistakes.add(
            "train.offload_activations: found true without student.gradient_checkpointing, whose "
            "inputs of layers it keeps in CPU memory; expected both or neither"
        )
    mistakes.raise_any()


def _check_heads(model: Any, size: int) -> None:
    config = text_config(model)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    # Where there are fewer heads of keys than slices, DeepSpeed gives several slices the same one.
    sizes = [
        n
        for n in range(2, heads + 1)
        if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)
    ]
    if size not in sizes:
        raise ConfigError(
            f"train.sequence_parallel_size: found {size} for a student of {heads} attention heads "
            f"and {kv_heads} of keys and values",
            expected="a divisor of the heads that divides those of keys and values or is a "
            "multiple of them",
            do=f"choose 1{''.join(f' or {n}' for n in sizes[:6])}",
        )


def _check_layers(model: Any, size: int, *, flash: bool) -> None:
    from torch import nn

    config = text_config(model)
    found = None
    kinds = set(getattr(config, "layer_types", None) or ()) - set(_WITHIN_ATTENTION)
    if kinds:
        found = f"layers of kind {', '.join(sorted(kinds))}"
    elif getattr(model, "_is_stateful", False) or any(
        isinstance(module, nn.Conv1d) for module in text_body(model).modules()
    ):
        found = "layers with a state"
    elif getattr(config, "kv_lora_rank", None):
        found = "latent attention, whose keys and values have different sizes"
    elif not getattr(model, "_supports_attention_backend", False):
        found = "an attention of its own"
    elif getattr(config, "attn_logit_softcapping", None) and not flash:
        found = "capped attention scores without flash attention"
    if found is not None:
        raise ConfigError(
            f"train.sequence_parallel_size: found {size} for {type(model).__name__}, which has "
            f"{found}",
            expected="full or sliding attention in every layer, by transformers' own functions",
            do="train it with train.sequence_parallel_size 1",
        )
