"""The sizes of a model by its config.json alone: parameters, bytes of weights, bytes of a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.models.resolve import text_config
from pipeline.models.windows import attention_windows

__all__ = ["ModelShape", "model_shape"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of gated MLPs, or of experts; other parts are counted where they are known."""

    hidden: int
    layers: int
    vocab_size: int
    inner: int
    """Hidden units of an MLP, of an expert where there are several."""
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    """Whether head and embedding are one."""
    experts: int = 1
    active_experts: int = 1
    """Experts that a token passes through."""
    vision: int = 0
    """Parameters of a vision tower and its projector, which text does not use."""
    linear_bytes: float = 2.0
    """Stored bytes of a parameter of the layers; heads and embeddings are stored in 16 bits."""
    block: int = 1
    """Rows and columns that share a scale of quantised weights; a part of a layer holds whole
    ones."""
    windows: tuple[int | None, ...] = ()
    """Tokens that one sees in each layer, as `attention_windows` has them; empty: all."""

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, or of the head."""
        return self.vocab_size * self.hidden

    @property
    def decoder(self) -> int:
        """Parameters of all layers, every expert."""
        return self.layers * self._layer(self.experts)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.decoder + self.embedding * (1 if self.tied else 2) + self.vision

    @property
    def used_parameters(self) -> int:
        """Parameters that a token is multiplied with: layers, its experts alone, and the head."""
        return self.layers * self._layer(self.active_experts) + self.embedding

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are stored in 16 bits, or quantised."""
        outside = self.parameters - self.decoder
        return int(self.decoder * self.linear_bytes + outside * 2)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of a token, in 16 bits."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def pruned(self, layers: Sequence[int]) -> ModelShape:
        """Return the shape with these layers."""
        windows = tuple(self.windows[layer] for layer in layers) if self.windows else ()
        return replace(self, layers=len(layers), windows=windows)

    def _layer(self, experts: int) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        router = self.hidden * self.experts if self.experts > 1 else 0
        return attention + experts * 3 * self.hidden * self.inner + router


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Return the sizes that a config.json describes.

    Args:
        config: as `read_model_config` returns it.
    """
    text = text_config(config)
    hidden = int(text.get("hidden_size") or text["n_embd"])
    heads = int(text.get("num_attention_heads") or text["n_head"])
    experts = int(text.get("num_experts") or text.get("num_local_experts") or 1)
    inner = int(text.get("intermediate_size") or 4 * hidden)
    if experts > 1:
        inner = int(text.get("moe_intermediate_size") or inner)
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))
    quantised = config.get("quantization_config") or {}
    blocks = quantised.get("weight_block_size") or [1]
    layers = int(text.get("num_hidden_layers") or text["n_layer"])
    return ModelShape(
        hidden=hidden,
        layers=layers,
        vocab_size=int(text["vocab_size"]),
        inner=inner,
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or hidden // heads),
        tied=bool(tied),
        experts=experts,
        active_experts=int(text.get("num_experts_per_tok") or 1),
        vision=_vision(config, hidden),
        linear_bytes=_linear_bytes(config, quantised),
        block=int(blocks[0]),
        windows=attention_windows(text, layers),
    )


def _vision(config: Mapping[str, Any], hidden: int) -> int:
    vision = config.get("vision_config") or {}
    if not {"hidden_size", "intermediate_size", "num_hidden_layers"} <= set(vision):
        return 0
    width, inner = int(vision["hidden_size"]), int(vision["intermediate_size"])
    layer = 4 * width * width + 2 * width * inner
    return int(vision["num_hidden_layers"]) * layer + width * hidden


def _linear_bytes(config: Mapping[str, Any], quantised: Mapping[str, Any]) -> float:
    if not quantised:
        stored = str(config.get("dtype") or config.get("torch_dtype"))
        return 4.0 if stored == "float32" else 2.0
    bits = quantised.get("bits") or (4 if quantised.get("load_in_4bit") else 8)
    return float(bits) / 8
