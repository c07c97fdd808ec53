"""Random models of a few thousand parameters, of several families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

VOCAB = 96
LAYERS = 6


def tiny_model(family: str = "llama", *, tied: bool = False, spread: float = 0.2) -> Any:
    """Return a random float32 causal LM with six layers in which every layer matters."""
    import torch
    import transformers as hf

    common: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "tie_word_embeddings": tied, "initializer_range": spread,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    kinds = ["full_attention", "sliding_attention"]
    layer_types = [kinds[i in (1, 2, 5)] for i in range(LAYERS)]
    configs = {
        "llama": lambda: hf.LlamaConfig(**common),
        "qwen3": lambda: hf.Qwen3Config(
            **common, head_dim=8, layer_types=layer_types, sliding_window=3, use_sliding_window=True
        ),
        "gemma3": lambda: hf.Gemma3TextConfig(
            **common, head_dim=8, layer_types=layer_types, sliding_window=3,
            query_pre_attn_scalar=8,
        ),
        "smollm3": lambda: hf.SmolLM3Config(**common, no_rope_layers=[1, 0, 0, 1, 1, 0]),
        "glm4": lambda: hf.Glm4Config(**common, head_dim=8),
        "granite": lambda: hf.GraniteConfig(**common, residual_multiplier=0.3),
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64,
            tie_word_embeddings=tied, initializer_range=spread,
        ),
        "gemma2": lambda: hf.Gemma2Config(**common, head_dim=8),
    }  # fmt: skip
    torch.manual_seed(0)
    model: Any = hf.AutoModelForCausalLM.from_config(configs[family](), dtype=torch.float32)
    with torch.no_grad():  # norms of ones and biases of zeros would hide a swap of layers
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def without_other_layers(model: Any, kept: Sequence[int]) -> Any:
    """Delete all other layers of a model in memory: what a cut file must amount to."""
    import torch

    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
    for name in ("layer_types", "no_rope_layers"):
        values = getattr(model.config, name, None)
        if values:
            setattr(model.config, name, [values[i] for i in kept])
    model.config.num_hidden_layers = len(kept)
    return model


def logits(model: Any) -> Any:
    """Return the logits on a fixed input, longer than the sliding windows."""
    import torch

    ids = (torch.arange(40).reshape(2, 20) * 7) % VOCAB
    with torch.no_grad():
        return model(ids, use_cache=False).logits
