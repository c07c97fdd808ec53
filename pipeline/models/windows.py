"""How far back each layer's attention looks, by config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["attended_pairs", "attention_windows"]

_PATTERNS = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4}
"""Families whose older configs name neither layers nor pattern: each so-many-th layer is full."""
_SLIDING = ("sliding", "local")


def attention_windows(text: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Return for each layer how many tokens one sees, itself included.

    None: all before it. 0: the layer has no attention (a state, a convolution). A layer that
    attends in chunks sees half of one on average. What the config does not say counts as full.

    Args:
        text: the part of a config.json that describes the language model.
        layers: how many there are.
    """
    window = text.get("sliding_window")
    if not isinstance(window, int) or window < 1 or text.get("use_sliding_window") is False:
        window = None
    chunk = text.get("attention_chunk_size")
    kinds = text.get("layer_types") or text.get("layers_block_type")
    if isinstance(kinds, list) and len(kinds) == layers:
        return tuple(_of_kind(str(kind), window, chunk) for kind in kinds)
    if window is None:
        return (None,) * layers
    pattern = text.get("sliding_window_pattern") or _PATTERNS.get(str(text.get("model_type")))
    if isinstance(pattern, int):
        return tuple(window if (layer + 1) % pattern else None for layer in range(layers))
    # Qwen's first layers are full, where windows are in use at all.
    first = text.get("max_window_layers") if text.get("use_sliding_window") else None
    first = first if isinstance(first, int) else 0
    return tuple(window if layer >= first else None for layer in range(layers))


def _of_kind(kind: str, window: int | None, chunk: object) -> int | None:
    if "chunked" in kind:
        return chunk // 2 if isinstance(chunk, int) else None
    if any(word in kind for word in _SLIDING):
        return window
    if ("attention" in kind and "linear" not in kind) or kind == "hybrid":
        return None
    return 0


def attended_pairs(length: float, window: int | None) -> float:
    """Return how many pairs of tokens see each other in a sequence, about: half of all, or fewer.

    Args:
        length: tokens.
        window: of `attention_windows`.
    """
    seen = length if window is None else min(window, length)
    return seen * length - seen * seen / 2
