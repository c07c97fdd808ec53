"""Which parameters text reaches: a vision tower that nothing runs would only be eaten by decay."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.student.forward.body import decoder_layers, text_body

__all__ = ["branches", "unreached_parameters"]

_log = logging.getLogger(__name__)


def unreached_parameters(model: Any) -> set[str]:
    """Return the names of the parameters that no loss on text reaches.

    Decided by structure, not by gradients: an expert that got no token today may get one tomorrow.
    Unreached is what lies outside body and head, and a decoder layer that does not run without
    what text lacks (the cross-attention of a model that also sees).

    Args:
        model: a causal language model; its weights may be missing or partitioned. Of a module
            that is none of transformers' everything counts as reached.
    """
    if not hasattr(model, "get_output_embeddings"):
        return set()
    parts = [text_body(model), model.get_input_embeddings(), model.get_output_embeddings()]
    reached = {id(p) for part in parts if part is not None for p in part.parameters()}
    for layer in _idle_layers(model):
        reached -= {id(parameter) for parameter in layer.parameters()}
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) not in reached
    }


def branches(model: Any, names: set[str]) -> list[str]:
    """Return the outermost modules all of whose parameters are among `names`."""
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found: list[str] = []
    for name in every:
        if name not in names or any(name.startswith(f"{branch}.") for branch in found):
            continue
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            branch = ".".join(parts[:depth])
            inside = [other for other in every if f"{other}.".startswith(f"{branch}.")]
            if all(other in names for other in inside):
                found.append(branch)
                break
    return found


def _idle_layers(model: Any) -> list[Any]:
    """Return the decoder layers that a pass over text does not call.

    Layers of the same parts are called alike. Where parts differ, the pass is one of the same
    architecture without memory or arithmetic; where a model's own code looks at numbers there, as
    routers of experts do, every layer counts as called.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    layers = decoder_layers(model)
    if len({tuple(name for name, _ in layer.named_children()) for layer in layers}) < 2:
        return []
    called: set[int] = set()
    try:
        with _unsaid(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            double = type(model)._from_config(
                copy.deepcopy(model.config), attn_implementation="eager"
            )
            for place, layer in enumerate(decoder_layers(double)):
                layer.register_forward_pre_hook(lambda *_, place=place: called.add(place))
            ids_1T = torch.arange(2)[None]
            text_body(double)(input_ids=ids_1T, position_ids=ids_1T, use_cache=False)
    except Exception as error:  # of whatever kind a model's own code raises on tensors of no memory
        _log.debug("no pass without memory (%s)", error)
        return []
    return [layer for place, layer in enumerate(layers) if place not in called]


@contextmanager
def _unsaid() -> Iterator[None]:
    """While open, torch does not print the traceback of an operation that it cannot imitate."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
