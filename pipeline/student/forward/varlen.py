"""torch's varlen_attn as an attention of transformers; the only file that knows it.

Flash kernels that torch brings for CUDA: packed sequences without a mask of [T, T], keys and values
of fewer heads, sliding windows. The contract is the one that transformers has for flash attention:
no mask, and boundaries by the names of `boundaries`.

Legend: B rows, H query heads, G key heads, T tokens of a row, D head, S sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import ModelError

__all__ = ["AttentionRefusedError", "register_varlen", "varlen_attention"]

_WIDEST = 256
_TYPES = (torch.float16, torch.bfloat16)


class AttentionRefusedError(ModelError):
    """A layer asks for what this attention does not compute."""


def register_varlen(name: str) -> None:
    """Make it known to transformers under a name; again changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    AttentionInterface.register(name, varlen_attention)
    AttentionMaskInterface.register(name, flash_attention_mask)


def varlen_attention(
    module: Any,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output [B, T, H, D], and no weights.

    Args:
        module: the layer's attention.
        query_BHTD: float16 or bfloat16; values may have a smaller D.
        key_BGTD: as the query; H is a multiple of G.
        value_BGTD: as the key.
        attention_mask: None; padding is not known here.
        dropout: 0.
        scaling: of the scores; None: 1 / sqrt(D).
        sliding_window: tokens that one sees, itself included.
        is_causal: None: what the module says.
        cu_seq_lens_q: int32 [S + 1], where sequences begin in the one row; None: rows are
            sequences.
        max_length_q: tokens of the longest sequence.
        others: what else transformers hands on; a soft cap, sinks and biases are refused.

    Raises:
        AttentionRefusedError: a layer that needs more than this.
    """
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, tokens, width = query_BHTD.shape
    _refuse(module, query_BHTD, key_BGTD, attention_mask, dropout, others)
    if cu_seq_lens_q is None or max_length_q is None:
        starts = torch.arange(rows + 1, dtype=torch.int32, device=query_BHTD.device) * tokens
        longest = tokens
    else:
        starts, longest = cu_seq_lens_q, max_length_q
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    left = -1 if sliding_window is None else sliding_window - 1
    narrow = value_BGTD.shape[-1]
    if narrow != width:
        value_BGTD = functional.pad(value_BGTD, [0, width - narrow])
    output: Any = varlen_attn(
        _flat(query_BHTD), _flat(key_BGTD), _flat(value_BGTD), starts, starts, longest, longest,
        scale=scaling, window_size=(left, 0 if causal else left),
        enable_gqa=key_BGTD.shape[1] != heads,
    )  # fmt: skip
    return output.view(rows, tokens, heads, width)[..., :narrow], None


def _flat(states_BHTD: Tensor) -> Tensor:
    """Return [B x T, H, D]."""
    return states_BHTD.transpose(1, 2).flatten(0, 1)


def _refuse(
    module: Any,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    others: dict[str, Any],
) -> None:
    bias = next((n for n in ("softcap", "s_aux", "position_bias") if others.get(n) is not None), "")
    found = {
        "softcap": "a soft cap on its scores",
        "s_aux": "attention sinks",
        "position_bias": "a bias on its scores",
        "": None,
    }[bias]
    if found is None and attention_mask is not None:
        found = "a mask"
    if found is None and dropout:
        found = f"dropout of {dropout:g} in attention"
    if found is None and query_BHTD.shape[2] != key_BGTD.shape[2]:
        found = "queries and keys of different lengths"
    if found is None and query_BHTD.shape[-1] > _WIDEST:
        found = f"heads of {query_BHTD.shape[-1]} numbers"
    if found is None and query_BHTD.dtype not in _TYPES:
        found = f"queries in {str(query_BHTD.dtype).removeprefix('torch.')}"
    if found is not None:
        raise AttentionRefusedError(
            f"{type(module).__name__} has {found}",
            expected="what torch's varlen_attn computes",
            do="use --student.attention auto",
        )
