"""A mend of vLLM's rotary kernel on a CPU, for heads in a dimension of their own."""

from __future__ import annotations

from typing import Any

from vllm import _custom_ops
from vllm.platforms import current_platform

__all__ = ["let_vllm_rotate_each_head"]


def let_vllm_rotate_each_head() -> None:
    """Give vLLM's rotary kernel on a CPU all heads of a token in one dimension.

    That of 0.32 takes [tokens, heads, size] for tokens of one head each. DeepSeek and LFM2 hand
    queries over like that, and their log-probs are off by whole nats in silence; the GPU's kernel
    reads both. Called in every process of vLLM that may hold a model.
    """
    real = _custom_ops.rotary_embedding
    if not current_platform.is_cpu() or getattr(real, "rotates_each_head", False):
        return

    def rotary_embedding(positions: Any, query: Any, key: Any, *others: Any, **named: Any) -> None:
        given = (query, key)
        flat = [
            one.reshape(*positions.shape, -1)
            if one is not None and one.dim() == positions.dim() + 2
            else one
            for one in given
        ]
        real(positions, *flat, *others, **named)
        for before, after in zip(given, flat, strict=True):
            # A part of a larger tensor has no such view, and was copied.
            if after is not before and after.data_ptr() != before.data_ptr():
                before.copy_(after.view_as(before))

    rotary_embedding.rotates_each_head = True  # type: ignore[attr-defined]
    _custom_ops.rotary_embedding = rotary_embedding
