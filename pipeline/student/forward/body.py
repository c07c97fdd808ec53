"""The part of a model that text goes through before its head, found without a list of models."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["decoder_layers", "takes_boundaries", "text_body", "text_config"]


def text_body(model: Any) -> Any:
    """Return the module that turns token ids into the hidden states that the head gets.

    transformers' `get_decoder()`, or what is inside it where that still holds the head: for a
    model that also sees this is its language model, without vision tower and projector.

    Args:
        model: a causal language model of transformers.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    body = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    while _holds(body, head):
        inner = [
            part
            for part in body.children()
            if _holds(part, embedding) and any(True for _ in part.children())
        ]
        if not inner:
            return body
        body = inner[0]
    return body


def text_config(model: Any) -> Any:
    """Return the config of the text part, which is the config itself of a model of text alone."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def decoder_layers(model: Any) -> list[Any]:
    """Return the decoder layers in order; none where the body has no stack of that many modules."""
    from torch import nn

    config = text_config(model)
    count = getattr(config, "num_hidden_layers", None)
    for module in text_body(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def takes_boundaries(body: Any) -> bool:
    """Return whether the body's forward hands on arguments that it does not name itself."""
    parameters = inspect.signature(body.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _holds(module: Any, part: Any) -> bool:
    return part is not None and any(other is part for other in module.modules())
