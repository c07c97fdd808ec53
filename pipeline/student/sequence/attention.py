"""Attention of sliced sequences by DeepSpeed's Ulysses: all tokens of a part of the heads.

Each process has a slice of the tokens and all heads; an exchange gives it all tokens of its share
of the heads, the attention runs, and an exchange brings its slice of the result back. What
DeepSpeed's own registration does besides is not used: it throws the mask away, so that under sdpa
packed sequences see each other, and it replaces an attention that other models of the process use.

Shapes: H heads here, T tokens of the whole pass, S of a slice, d of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

from pipeline.errors import ModelError

__all__ = ["SequenceAttention", "attention_by_sequence"]

_NAME = "sequence_parallel"
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

Core = Callable[..., Any]


class SequenceAttention:
    """The attention of every layer of one model, in the place of sdpa or flash attention.

    `lengths` says where sequences start. It is state, not an argument: a layer that is recomputed
    in the backward pass finds it as its forward pass did, whatever arguments a model hands on.
    """

    def __init__(self, process_group: Any) -> None:
        """Keep the process group of the slices."""
        self._group = process_group
        self._core: Core = _sdpa_by_sequence
        self._exchanges: dict[tuple[int, int, int], Any] = {}
        self.lengths: tuple[int, ...] = ()
        """Tokens of each sequence of the pass, padding included; set before each forward pass."""

    def install(self, model: Any) -> None:
        """Let every layer of a transformers model call this one, around the kernels it used."""
        from transformers import AttentionInterface

        self._core = _CORES.get(model.config._attn_implementation, _sdpa_by_sequence)
        # No function for masks goes with the name: models then make none for their slice.
        AttentionInterface.register(_NAME, self)
        model.set_attn_implementation(_NAME)

    def __call__(
        self, module: Any, query_1HSd: Any, key_1HSd: Any, value_1HSd: Any, mask: Any, **kwargs: Any
    ) -> tuple[Any, None]:
        """Return [1, S, H, d], as the interface of transformers has it: models flatten it.

        Raises:
            ModelError: an attention that is more than causal attention within each sequence.
        """
        import torch

        for name in ("position_bias", "s_aux"):  # ALiBi and the like; sinks
            if kwargs.get(name) is not None:
                raise ModelError(
                    f"{type(module).__name__} passes {name} to its attention",
                    expected="attention without it, under train.sequence_parallel_size",
                    do="train this student with train.sequence_parallel_size 1",
                )
        exchange = self._exchange(query_1HSd, key_1HSd)
        # DeepSpeed gathers them for a core that tells sequences apart by them; ours does not.
        kwargs["position_ids"] = torch.zeros(1, 1, dtype=torch.int64, device=query_1HSd.device)
        output, _ = exchange(module, query_1HSd, key_1HSd, value_1HSd, None, **kwargs)
        return output.unflatten(-1, (query_1HSd.shape[1], -1)), None

    def _exchange(self, query_1HSd: Any, key_1HSd: Any) -> Any:
        """Return DeepSpeed's exchange for these heads; layers may differ in them."""
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        heads, kv_heads, size = query_1HSd.shape[1], key_1HSd.shape[1], query_1HSd.shape[3]
        key = (heads, kv_heads, size)
        if key not in self._exchanges:
            self._exchanges[key] = UlyssesSPAttentionHF(
                attn=self._attend,
                batch_size=1,
                attn_head_count=heads,
                attn_head_size=size,
                kv_head_count=kv_heads,
                num_hidden_layers=1,
                process_group=self._group,
                seq_length_is_variable=True,
            )
        return self._exchanges[key]

    def _attend(
        self, module: Any, query_1HTd: Any, key_1HTd: Any, value_1HTd: Any, mask: Any, **kwargs: Any
    ) -> tuple[Any, None]:
        assert sum(self.lengths) == query_1HTd.shape[2], "lengths of another pass"
        for name in (*_BOUNDARIES, "position_ids"):
            kwargs.pop(name, None)
        states = (query_1HTd, key_1HTd, value_1HTd)
        return self._core(module, *states, self.lengths, **kwargs), None


def attention_by_sequence(
    query_1HTd: Any,
    key_1HTd: Any,
    value_1HTd: Any,
    lengths: tuple[int, ...],
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> Any:
    """Return causal attention within each sequence, [1, T, H, d], one sequence after the other.

    Without a mask where a sequence fits its window, so that of long ones torch's flash kernels keep
    no [T, T] array and grouped heads are not repeated. A longer one is cut into stretches of a
    window, whose masks have two windows of keys.

    Args:
        query_1HTd: of all sequences, end to end.
        key_1HTd: of as many heads or, grouped, of a divisor of them.
        value_1HTd: likewise.
        lengths: tokens of each sequence; their sum is T.
        dropout: of the attention's weights.
        scaling: of the scores; None: 1 / sqrt(d).
        sliding_window: tokens that a token sees, itself included; None: all before it.
    """
    import torch
    from torch.nn import functional

    groups = query_1HTd.shape[1] // key_1HTd.shape[1]

    def attend(first: int, last: int, low: int, mask: Any) -> Any:
        key, value = key_1HTd[:, :, low:last], value_1HTd[:, :, low:last]
        if mask is not None and groups > 1:  # with a mask, grouped heads have no fast kernel
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        return functional.scaled_dot_product_attention(
            query_1HTd[:, :, first:last],
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=groups > 1 and mask is None,
        )

    parts = []
    for start, stop in pairwise(accumulate(lengths, initial=0)):
        if sliding_window is None or stop - start <= sliding_window:
            parts.append(attend(start, stop, start, None))
            continue
        for first in range(start, stop, sliding_window):
            last, low = min(first + sliding_window, stop), max(start, first - sliding_window + 1)
            places = torch.arange(low, last, device=query_1HTd.device)
            distance = places[first - low :, None] - places[None, :]
            parts.append(attend(first, last, low, (distance >= 0) & (distance < sliding_window)))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _sdpa_by_sequence(
    module: Any, query_1HTd: Any, key_1HTd: Any, value_1HTd: Any, lengths: tuple[int, ...],
    **kwargs: Any,
) -> Any:  # fmt: skip
    if kwargs.get("softcap") is not None:
        raise ModelError(
            f"{type(module).__name__} caps its scores, which sdpa does not",
            expected="flash attention, under train.sequence_parallel_size",
            do="train with --student.attention flash, or another student",
        )
    names = ("dropout", "scaling", "sliding_window")
    taken = {name: kwargs[name] for name in names if name in kwargs}
    return attention_by_sequence(query_1HTd, key_1HTd, value_1HTd, lengths, **taken)


def _flash_by_sequence(
    module: Any, query_1HTd: Any, key_1HTd: Any, value_1HTd: Any, lengths: tuple[int, ...],
    **kwargs: Any,
) -> Any:  # fmt: skip
    """Call transformers' flash attention, not by its interface: that reads the model's config."""
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    return _flash_attention_forward(
        *(x.transpose(1, 2) for x in (query_1HTd, key_1HTd, value_1HTd)),
        None,
        query_length=query_1HTd.shape[2],
        is_causal=True,
        dropout=kwargs.get("dropout", 0.0),
        softmax_scale=kwargs.get("scaling"),
        sliding_window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        attn_implementation="flash_attention_2",
        **_boundaries(lengths, query_1HTd.device),
    )


def _varlen_by_sequence(
    module: Any, query_1HTd: Any, key_1HTd: Any, value_1HTd: Any, lengths: tuple[int, ...],
    **kwargs: Any,
) -> Any:  # fmt: skip
    from pipeline.student.forward.varlen import varlen_attention

    found = _boundaries(lengths, query_1HTd.device)
    output, _ = varlen_attention(
        module, query_1HTd, key_1HTd, value_1HTd, None, **{**kwargs, **found}
    )
    return output


def _boundaries(lengths: tuple[int, ...], device: Any) -> dict[str, Any]:
    """Return where the sequences of the whole row begin, by the names of transformers."""
    from pipeline.student.forward.ways import boundaries

    found = boundaries(lengths, device)
    return {name: found[name] for name in _BOUNDARIES}


_CORES: dict[str, Core] = {
    "torch_varlen": _varlen_by_sequence,
    "flash_attention_2": _flash_by_sequence,
    "sdpa": _sdpa_by_sequence,
    "eager": _sdpa_by_sequence,
}
