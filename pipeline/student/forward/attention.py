"""Which attention the student computes with: by setting, machine and comparison."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, ModelError
from pipeline.models.load import require_flash_attention
from pipeline.student.forward.body import text_config

if TYPE_CHECKING:
    from pipeline.student.forward.ways import BodyForward

__all__ = [
    "attention_order",
    "fit_attention",
    "make_known",
    "require_attention",
    "settle_attention",
]

_log = logging.getLogger(__name__)
_VARLEN = "torch_varlen"
_NAMES = {
    "varlen": _VARLEN, "flash": "flash_attention_2", "flex": "flex_attention", "sdpa": "sdpa",
    "eager": "eager",
}  # fmt: skip
_FLOAT32, _ROUNDED = 1e-4, 1e-1


def require_attention(wanted: str, dtype: str, *, on_gpu: bool, elsewhere: bool = False) -> None:
    """Reject an attention that this machine does not have; looks at no model.

    Args:
        wanted: `auto` or one by name (`student.attention`).
        dtype: of weights and activations.
        on_gpu: whether training is on one.
        elsewhere: training is forecast for another machine, whose packages are not known.

    Raises:
        ConfigError: no GPU, no such package, or float32 where only 16 bit is computed.
    """
    if wanted in ("auto", "sdpa", "eager"):
        return
    there = ", ".join(_there(dtype, on_gpu=on_gpu))
    if wanted == "flash":
        instead = "use --student.attention auto, or --no-use_flash_attention"
        if not elsewhere:
            require_flash_attention(on_gpu=on_gpu, instead=instead)
        if dtype == "float32":
            raise ConfigError(
                "use_flash_attention in float32",
                expected="bfloat16 or float16, which are all that it computes in",
                do=f"train with --bf16, or {instead}",
            )
    where = None
    if not on_gpu:
        where = "on a machine without a GPU"
    elif wanted == "varlen":
        where = None if _has_varlen() else "with a torch that has no varlen_attn"
        where = "in float32" if where is None and dtype == "float32" else where
    elif wanted == "flex" and not elsewhere and importlib.util.find_spec("triton") is None:
        where = "without the package triton"
    if where:
        raise ConfigError(
            f"student.attention: found {wanted} {where}",
            expected=f"one that is there: {there}",
            do="use --student.attention auto",
        )


def attention_order(wanted: str, dtype: str, *, on_gpu: bool) -> tuple[str, ...]:
    """Return transformers' names of the attentions to be tried, the first that fits is taken."""
    if wanted != "auto":
        return (_NAMES[wanted],)
    varlen = on_gpu and dtype != "float32" and _has_varlen()
    return (*((_VARLEN,) if varlen else ()), "sdpa", "eager")


def make_known(order: Sequence[str]) -> None:
    """Tell transformers of those that are not its own."""
    if _VARLEN in order:
        from pipeline.student.forward.varlen import register_varlen

        register_varlen(_VARLEN)


def fit_attention(model: Any, order: tuple[str, ...]) -> None:
    """Take another attention where the model's own code says that it does not serve the first.

    varlen serves what flash attention serves, whose contract it has. A soft cap on the scores is
    left out by sdpa in silence.

    Raises:
        ModelError: the only attention asked for does not serve it.
    """
    used = model.config._attn_implementation
    capped = getattr(text_config(model), "attn_logit_softcapping", None)
    reason = None
    if used == _VARLEN and not (
        model._supports_flash_attn and model._can_set_attn_implementation()
    ):
        reason = "its code does not serve flash attention"
    elif used in (_VARLEN, "sdpa") and capped:
        reason = f"its scores have a soft cap of {capped:g}"
    if reason is None:
        return
    rest = order[order.index(used) + 1 :]
    if capped:
        rest = tuple(name for name in rest if name == "eager")
    if not rest:
        raise ModelError(
            f"student.attention: {type(model).__name__} cannot use {_spoken(used)} ({reason})",
            expected="an attention that serves it",
            do="use --student.attention auto",
        )
    for name in rest:
        try:
            model.set_attn_implementation(name)
        except ValueError:
            continue
        return


def settle_attention(
    model: Any,
    forward: BodyForward,
    order: tuple[str, ...],
    *,
    device: Any,
    gather: Callable[[Any], list[Any]],
) -> str:
    """Compare the attention with transformers' eager one on the student's own weights.

    All ranks call it at once. Where the two differ, or the attention refuses a layer, the next one
    is taken.

    Args:
        model: with its weights on the device.
        forward: its body.
        order: of `attention_order`.
        device: where the weights are.
        gather: returns every rank's value on every rank.

    Returns:
        transformers' name of the attention in use.

    Raises:
        ModelError: none that may be used is right.
    """
    import torch

    from pipeline.student.forward.refusal import refusal, refusals_in_words
    from pipeline.student.forward.trial import quiet_passes, relative_errors, trial_row

    used = str(model.config._attn_implementation)
    if used == "eager" or not model._can_set_attn_implementation():
        return used
    ids_1T, positions_1T = trial_row(model, (13,), device)
    way, forward.way = forward.way, "alone"
    reason = ""
    try:
        with quiet_passes(model):
            with refusals_in_words(model, "one sequence by eager attention"):
                model.set_attn_implementation("eager")
                eager_TD = forward(ids_1T, positions_1T, (13,)).hidden_TD
            for name in (used, *order[order.index(used) + 1 :]):
                try:
                    model.set_attn_implementation(name)
                    error_T = relative_errors(
                        forward(ids_1T, positions_1T, (13,)).hidden_TD, eager_TD
                    )
                    whole = eager_TD.dtype == torch.float32
                    error = float(error_T.max() if whole else error_T.median())
                    said = "" if error <= (_FLOAT32 if whole else _ROUNDED) else (
                        f"its hidden states differ from eager attention's by {error:.2g}"
                    )  # fmt: skip
                except ModelError as refused:
                    said = str(refused).strip().splitlines()[0]
                except Exception as failed:
                    reported = refusal(failed)
                    if reported is None:
                        raise
                    said = reported
                said = next((every for every in gather(said) if every), "")
                if not said:
                    if reason:
                        _log.info("attention: %s, because %s", _spoken(name), reason)
                    return name
                reason = f"{_spoken(name)} does not serve this student ({said})"
    finally:
        forward.way = way
    raise ModelError(
        f"student.attention: {reason}",
        expected="an attention that serves it",
        do="use --student.attention auto",
    )


def _there(dtype: str, *, on_gpu: bool) -> list[str]:
    names = ["sdpa", "eager"]
    if on_gpu and importlib.util.find_spec("triton"):
        names.insert(0, "flex")
    if on_gpu and dtype != "float32" and importlib.util.find_spec("flash_attn"):
        names.insert(0, "flash")
    if on_gpu and dtype != "float32" and _has_varlen():
        names.insert(0, "varlen")
    return names


def _has_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _spoken(name: str) -> str:
    return next((ours for ours, theirs in _NAMES.items() if theirs == name), name)
