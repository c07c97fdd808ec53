"""Load a causal language model with transformers."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, ModelError
from pipeline.models.device import uses_gpu
from pipeline.program import how_to_install

__all__ = [
    "load_causal_lm",
    "quieten_transformers",
    "require_flash_attention",
    "with_first_attention",
]


def load_causal_lm(
    folder: Path,
    *,
    dtype: str,
    attention: Sequence[str] = ("sdpa", "eager"),
    trust_remote_code: bool = False,
) -> Any:
    """Load a model folder; on the CPU, or partitioned under ZeRO 3.

    Args:
        folder: as `save_pretrained` writes it.
        dtype: `float32`, `bfloat16` or `float16`.
        attention: transformers' names; the first that the architecture does not refuse is used.
            sdpa is passed over, where there is another, for a model whose scores have a soft cap
            (Gemma 2): it leaves the cap out in silence.
        trust_remote_code: run model code that the folder brings.

    Raises:
        ConfigError: flash attention is requested but not available.
        ModelError: transformers cannot load the folder as a causal language model.
    """
    import torch
    from safetensors import SafetensorError

    quieten_transformers()
    from transformers import AutoModelForCausalLM

    if "flash_attention_2" in attention:
        require_flash_attention(on_gpu=uses_gpu())
    try:
        model = with_first_attention(
            lambda name: AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                attn_implementation=name,
                trust_remote_code=trust_remote_code,
            ),
            attention,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{folder}: transformers cannot load it ({reason})", expected="a causal language model"
        ) from error
    return _with_all_of_it(model, attention)


def _with_all_of_it(model: Any, attention: Sequence[str]) -> Any:
    """Return the model with an attention that computes its scores as its config says."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    rest = [name for name in attention if name != "sdpa"]
    if capped and rest and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(rest[-1])
    return model


def with_first_attention(build: Callable[[str], Any], attention: Sequence[str]) -> Any:
    """Return what `build` makes with the first attention that the architecture does not refuse.

    transformers refuses before it reads weights.
    """
    for name in attention[:-1]:
        try:
            return build(name)
        except ValueError as error:
            if "does not support an attention" not in str(error):
                raise
    return build(attention[-1])


def quieten_transformers() -> None:
    """Silence its progress bars and DeepSpeed's accelerator messages (debug keeps both).

    One bar per load and save, six times a run, none of which lasts a second.
    """
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        return
    if not uses_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def require_flash_attention(
    *, on_gpu: bool, instead: str = "switch it off with --no-use_flash_attention"
) -> None:
    """Reject flash attention where it is not available; `instead` is what to do.

    Raises:
        ConfigError: no GPU, or no package flash-attn.
    """
    if on_gpu and importlib.util.find_spec("flash_attn"):
        return
    where = "without the package flash-attn" if on_gpu else "on a machine without a GPU"
    raise ConfigError(
        f"use_flash_attention {where}",
        expected="a GPU and flash-attn",
        do=instead + (f", or {how_to_install('flash')}" if on_gpu else ""),
    )
