"""Width pruning by activations, as Minitron (2407.14679) does it: channels, heads and neurons.

Importance of a unit is the size of its activations, averaged over a sequence and taken as L2 over
sequences. Channels of the residual stream are ranked over all norms, heads and neurons within
their layer; query heads within their key-value group, which keeps grouped attention whole. Without
the paper's merging of pruned heads into kept ones. For models of Llama's shape.

Shapes: L layers, D channels, H query heads, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Importance", "Shape", "importance_of", "neurons_for", "pruned_in_width"]


@dataclass(frozen=True, slots=True)
class Shape:
    """What is left of each layer."""

    channels: int
    heads: int
    neurons: int


@dataclass(frozen=True, slots=True)
class Importance:
    """Of all units of a model."""

    channels_D: Tensor
    heads_LH: Tensor
    neurons_LF: Tensor


def neurons_for(parameters: int, config: Any, channels: int, heads: int, *, step: int = 8) -> int:
    """Return the neurons with which a narrower model comes nearest to a number of parameters.

    Args:
        parameters: of all of the model, tied embeddings once.
        config: of the model that is pruned.
        channels: that are kept.
        heads: query heads that are kept.
        step: of which the number is a multiple.
    """
    layers, size = config.num_hidden_layers, config.head_dim
    attention = 2 * channels * size * (heads + config.num_key_value_heads)
    fixed = channels * config.vocab_size + layers * (attention + 2 * channels) + channels
    return max(step, round((parameters - fixed) / (3 * channels * layers) / step) * step)


@torch.no_grad()
def importance_of(model: Any, sequences: Sequence[NDArray[np.int32]]) -> Importance:
    """Return the importance of every unit on some sequences of token ids."""
    layers, heads = model.model.layers, model.config.num_attention_heads
    channels: list[Tensor] = []  # of this sequence, one a norm
    by_head: list[Tensor] = []
    by_neuron: list[Tensor] = []
    sums: list[Tensor] = []

    def of_heads(_m: Any, args: tuple[Any, ...]) -> None:
        by_head.append(args[0][0].unflatten(-1, (heads, -1)).norm(dim=-1).mean(0))

    norms = [n for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    with _hooked(
        [
            *(norm.register_forward_hook(lambda _m, _a, out: channels.append(out[0].abs().mean(0)))
              for norm in (*norms, model.model.norm)),
            *(layer.self_attn.o_proj.register_forward_pre_hook(of_heads) for layer in layers),
            *(layer.mlp.down_proj.register_forward_pre_hook(
                lambda _m, args: by_neuron.append(args[0][0].abs().mean(0))) for layer in layers),
        ]
    ):  # fmt: skip
        for ids_L in sequences:
            model.model(torch.from_numpy(ids_L.astype(np.int64))[None], use_cache=False)
            found = [torch.stack(part).square() for part in (channels, by_head, by_neuron)]
            sums = found if not sums else [a + b for a, b in zip(sums, found, strict=True)]
            for part in (channels, by_head, by_neuron):
                part.clear()
    channels_ND, heads_LH, neurons_LF = (part.sqrt() for part in sums)
    return Importance(channels_ND.sum(0), heads_LH, neurons_LF)


def pruned_in_width(model: Any, importance: Importance, shape: Shape) -> Any:
    """Return a new model of the most important units; the given one stays as it is."""
    config = type(model.config)(**model.config.to_dict())
    groups, size = config.num_key_value_heads, config.head_dim
    config.hidden_size, config.intermediate_size = shape.channels, shape.neurons
    config.num_attention_heads = shape.heads
    narrow = type(model)(config).to(dtype=model.dtype)
    kept_d = _largest(importance.channels_D, shape.channels)
    with torch.no_grad():
        narrow.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, kept_d])
        narrow.lm_head.weight.copy_(model.lm_head.weight[:, kept_d])
        narrow.model.norm.weight.copy_(model.model.norm.weight[kept_d])
        for index, (new, old) in enumerate(
            zip(narrow.model.layers, model.model.layers, strict=True)
        ):
            kept_f = _largest(importance.neurons_LF[index], shape.neurons)
            heads_GH = importance.heads_LH[index].view(groups, -1)
            in_group = torch.stack([_largest(row, shape.heads // groups) for row in heads_GH])
            kept_h = (in_group + torch.arange(groups)[:, None] * heads_GH.shape[1]).flatten()
            rows_h = (kept_h[:, None] * size + torch.arange(size)).flatten()
            for name in ("input_layernorm", "post_attention_layernorm"):
                getattr(new, name).weight.copy_(getattr(old, name).weight[kept_d])
            theirs, ours = old.self_attn, new.self_attn
            ours.q_proj.weight.copy_(theirs.q_proj.weight[rows_h][:, kept_d])
            for name in ("k_proj", "v_proj"):
                getattr(ours, name).weight.copy_(getattr(theirs, name).weight[:, kept_d])
            ours.o_proj.weight.copy_(theirs.o_proj.weight[kept_d][:, rows_h])
            for name in ("gate_proj", "up_proj"):
                getattr(new.mlp, name).weight.copy_(
                    getattr(old.mlp, name).weight[kept_f][:, kept_d]
                )
            new.mlp.down_proj.weight.copy_(old.mlp.down_proj.weight[kept_d][:, kept_f])
    return narrow.eval()


def _largest(importance_N: Tensor, count: int) -> Tensor:
    """Return the places of the largest, in their order: with all of them nothing changes."""
    return importance_N.topk(count).indices.sort().values


@contextmanager
def _hooked(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
