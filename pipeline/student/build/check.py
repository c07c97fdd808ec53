"""All that can be said against a student before its weights are loaded: from names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, Mistakes, ModelError
from pipeline.loss.settings import LossSettings
from pipeline.student.build.freeze import learning_parameters
from pipeline.student.build.lora import check_lora
from pipeline.student.build.prune import check_stack, pruned_config
from pipeline.student.build.reconstruct import check_reconstruction
from pipeline.student.build.skeleton import build_skeleton
from pipeline.student.build.weights import tensor_shapes
from pipeline.student.forward.attention import attention_order, require_attention
from pipeline.student.forward.router import router_loss
from pipeline.student.sequence.check import check_sequence_settings
from pipeline.student.settings.student import StudentSettings
from pipeline.student.settings.train import TrainSettings

__all__ = ["check_student"]


def check_student(
    folder: Path,
    settings: StudentSettings,
    train: TrainSettings,
    loss: LossSettings,
    *,
    vocabulary_size: int | None,
    on_gpu: bool,
    elsewhere: bool = False,
) -> None:
    """Go the way of the run, from pruning to what learns, on a student without weights.

    Args:
        folder: of the model that the student starts from.
        settings: of the student.
        train: its precision, and how its passes are sliced.
        loss: that goes into its head.
        vocabulary_size: rows of the head that are used; None where that is not known.
        on_gpu: whether it is trained on one.
        elsewhere: that is another machine, for which a forecast is made.

    Raises:
        ConfigError: settings that this student cannot serve.
        ModelError: a model that cannot be the student, or weights that are not complete.
    """
    mistakes = Mistakes()
    dtype = train.dtype(on_gpu=on_gpu)
    attention = "auto"
    with mistakes.collected():
        require_attention(settings.chosen_attention, dtype, on_gpu=on_gpu, elsewhere=elsewhere)
        attention = settings.chosen_attention
    with mistakes.collected():
        _check_precision(dtype, on_gpu=on_gpu)
    shapes = None
    with mistakes.collected():
        shapes = tensor_shapes(folder)
        if settings.keep_layers is not None:
            pruned_config(folder, settings.keep_layers)
            if shapes is None:
                raise ModelError(
                    f"{folder}: no safetensors files", expected="weights as save_pretrained writes"
                )
            check_stack(shapes, settings.keep_layers, folder)
    # Where an attention is not there, the rest still can be checked. flash is looked for by
    # transformers on the machine itself, which need not be the one that trains.
    attention = "auto" if attention == "flash" else attention
    order = attention_order(attention, dtype, on_gpu=on_gpu)
    model = None
    with mistakes.collected():
        model = build_skeleton(folder, settings, dtype=dtype, order=order)
    if model is not None:
        _check_model(
            model, settings, loss, mistakes, vocabulary_size=vocabulary_size, shapes=shapes or {}
        )
        with mistakes.collected():
            check_sequence_settings(model, settings, train)
    mistakes.raise_any()


def _check_precision(dtype: str, *, on_gpu: bool) -> None:
    if dtype == "float16" and not on_gpu:
        raise ConfigError(
            "fp16 on a machine without a GPU",
            expected="one: float16 is trained with a scaled loss, which DeepSpeed has for GPUs",
            do="train with --bf16 or in float32, with --no-fp16",
        )


def _check_model(
    model: Any,
    settings: StudentSettings,
    loss: LossSettings,
    mistakes: Mistakes,
    *,
    vocabulary_size: int | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    from pipeline.loss.head import install_distill_head

    with mistakes.collected():
        _check_rows(model, shapes)
    with mistakes.collected():
        install_distill_head(model, loss, valid_vocab=vocabulary_size)
    if settings.router_aux_loss != "none":
        with mistakes.collected():
            router_loss(model, settings.router_aux_loss, settings.router_aux_coefficient)
    if settings.reconstruct != "none":
        with mistakes.collected():
            check_reconstruction(model)
    if settings.gradient_checkpointing and not model.supports_gradient_checkpointing:
        mistakes.add(
            f"student.gradient_checkpointing: found true for {type(model).__name__}, which cannot "
            "recompute its activations; expected false"
        )
    with mistakes.collected():
        if settings.lora.enabled:
            check_lora(model, settings.lora)
        else:
            learning_parameters(model, settings)


def _check_rows(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the rows of embedding and head with those that the weights have."""
    if getattr(model.config, "quantization_config", None) is not None:
        return  # packed, in shapes of their own
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    matrices = [module.weight for module in modules if hasattr(module, "weight")]
    for name, parameter in model.named_parameters():
        if not any(parameter is matrix for matrix in matrices):
            continue
        # Files of GPT-2's time leave the first part of the name to whoever loads them.
        found = next(
            (shape for stored, shape in shapes.items() if f".{name}".endswith(f".{stored}")), None
        )
        if found is not None and found != tuple(parameter.shape):
            raise ModelError(
                f"the student's weights hold {name} of shape {list(found)}, its config.json says "
                f"{list(parameter.shape)}",
                expected="the same",
                do="correct vocab_size in its config.json, or take another copy of the model",
            )
