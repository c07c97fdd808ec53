"""In which precision vLLM multiplies with the head, by what the model's config says of it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["head_dtype", "head_is_quantised"]

_HEAD = "lm_head"
_BY_ITS_KEY = ("gptq", "gptq_marlin", "awq", "awq_marlin", "moe_wna16")
_UNLESS_LEFT_OUT = ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")


def head_dtype(
    config: Mapping[str, Any], dtype: str, overrides: Mapping[str, Any] | None = None
) -> str:
    """Return the dtype of the product with the head where vLLM captures on the device.

    float32 by default, as vLLM does for a model that pools: log-probs are differences of logits. A
    quantised head is multiplied in the model's dtype: vLLM's kernels for it know no other.

    Args:
        config: as `read_model_config` returns it.
        dtype: the model's, such as `bfloat16`.
        overrides: of the config (`hf_overrides`); what they say of the head is followed.
    """
    chosen = (overrides or {}).get("head_dtype", config.get("head_dtype"))
    if chosen is not None:
        return dtype if chosen == "model" else str(chosen).removeprefix("torch.").lower()
    return dtype if head_is_quantised(config) else "float32"


def head_is_quantised(config: Mapping[str, Any]) -> bool:
    """Return whether vLLM loads the head with quantised weights.

    Args:
        config: as `read_model_config` returns it.
    """
    text = config.get("text_config") or {}
    said = config.get("quantization_config") or text.get("quantization_config")
    if not isinstance(said, Mapping):
        return False
    method = str(said.get("quant_method", "")).lower()
    if method in _BY_ITS_KEY:
        return bool(said.get(_HEAD, False))
    if method == "compressed-tensors":
        return _compressed(said)
    if method in _UNLESS_LEFT_OUT:
        inner = said.get("quantization") or said
        left_out = inner.get("exclude_modules") or said.get("ignore") or []
        return not _names_head(left_out)
    if method in ("auto-round", "inc"):
        extra = said.get("extra_config") or {}
        bits = [value.get("bits", 16) for name, value in extra.items() if _names_head([name])]
        return bool(bits) and int(bits[0]) < 16
    return False  # fp8, bitsandbytes, mxfp4: linear layers alone


def _compressed(said: Mapping[str, Any]) -> bool:
    """A head counts as a linear layer there, unless it is left out."""
    if _names_head(said.get("ignore") or []):
        return False
    targets = [
        target
        for group in (said.get("config_groups") or {}).values()
        if group.get("weights") is not None
        for target in group.get("targets") or []
    ]
    return "Linear" in targets or _names_head(targets)


def _names_head(names: Sequence[str]) -> bool:
    """Return whether one of the names, globs, or patterns after `re:` is the head's."""
    for name in map(str, names):
        pattern = name.removeprefix("re:") if name.startswith("re:") else fnmatch.translate(name)
        if re.match(pattern, _HEAD) or name.rsplit(".", 1)[-1] == _HEAD:
            return True
    return False
