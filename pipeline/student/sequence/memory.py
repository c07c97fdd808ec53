"""What makes room for long slices: MLPs in tiles, inputs of checkpointed layers in CPU memory.

DeepSpeed 0.19.8 has a `TiledMLP`, which is not used: `torch.chunk` gives fewer tiles than it
counts where a pass has few tokens, and it then never marks the gradients of the weights as ready,
so that ZeRO loses them.

Shapes: T tokens of a slice, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.errors import ConfigError
from pipeline.student.forward.body import decoder_layers

__all__ = ["dense_mlps", "offload_checkpoints", "tile_mlps"]

_NAMES = ("mlp", "feed_forward")


def dense_mlps(model: Any) -> list[Any]:
    """Return the MLPs of a transformers model's layers, without mixtures of experts.

    Raises:
        ConfigError: it has none.
    """
    found = [
        child
        for layer in decoder_layers(model)
        for name in _NAMES
        if (child := getattr(layer, name, None)) is not None and _is_dense(child)
    ]
    if not found:
        raise ConfigError(
            f"train.tiled_mlp: found true for {type(model).__name__}, whose layers have no dense "
            "MLP",
            expected="false for this student",
        )
    return found


def _is_dense(module: Any) -> bool:
    """Whether a module is linear maps and an activation: one token's output is its own."""
    names = [name for name, _ in module.named_children()]
    return not any(name in ("experts", "gate", "router", "shared_expert") for name in names)


def tile_mlps(model: Any, *, tiles: int) -> None:
    """Let each dense MLP compute its tokens tile by tile, and again in the backward pass.

    Its inner activations, about four times `inner` numbers a token, are then those of one tile.
    The number of tiles is the same for any number of tokens: under ZeRO 3 each tile gathers the
    weights, together with all other ranks, whose passes may be shorter.

    Args:
        model: of transformers, in place.
        tiles: at least 1; some are empty where there are fewer tokens.
    """
    for mlp in dense_mlps(model):
        mlp.forward = _tiled(mlp.forward, tiles)


def _tiled(forward: Callable[[Any], Any], tiles: int) -> Callable[[Any], Any]:
    def run(hidden_1TD: Any) -> Any:
        import torch
        from torch.utils.checkpoint import checkpoint

        parts = torch.tensor_split(hidden_1TD, tiles, dim=1)
        if torch.is_grad_enabled():
            # Autograd adds the tiles' gradients of a weight before it is told to ZeRO.
            return torch.cat(
                [checkpoint(forward, part, use_reentrant=False) for part in parts], dim=1
            )
        return torch.cat([forward(part) for part in parts], dim=1)

    return run


def offload_checkpoints(model: Any, *, on_gpu: bool) -> None:
    """Keep what checkpointed layers are computed again from in CPU memory; nothing else.

    Args:
        model: of transformers, with gradient checkpointing enabled, in place.
        on_gpu: pin the memory, for a copy at the speed of the bus.
    """
    for module in model.modules():
        call = getattr(module, "_gradient_checkpointing_func", None)
        if call is not None:
            module._gradient_checkpointing_func = _saving_on_cpu(call, pinned=on_gpu)


def _saving_on_cpu(call: Callable[..., Any], *, pinned: bool) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any) -> Any:
        from torch.autograd.graph import save_on_cpu

        # The checkpoint saves its inputs under these hooks, and has its own for all that the layer
        # saves inside.
        with save_on_cpu(pin_memory=pinned):
            return call(function, *args)

    return run
