"""Tiny teachers of many architectures: the families of the packing check, as wide as vLLM wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny_families import FAMILIES, family_model

__all__ = ["NOT_ON_A_CPU", "TEACHERS", "save_teacher"]

NOT_ON_A_CPU = frozenset(
    {
        "Bamba", "Jamba", "Mamba", "MiniMax", "OLMo hybrid", "Qwen3-Next", "Qwen3.5",
        "RecurrentGemma",
    }
)  # fmt: skip
"""Teachers that vLLM's CPU build does not run; of any other it is an error."""
VOCAB = 333
"""Not a multiple of the 64 rows to which vLLM pads a head."""
FIRST_WORD = 64
"""Ids below may mean something: ends, images."""
_TIMES = 4
"""vLLM's attention on a CPU starts at heads of 32."""
_WIDTHS = (
    "hidden_size", "intermediate_size", "head_dim", "query_pre_attn_scalar", "n_embd", "lru_width",
    "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp",
    "shared_intermediate_size", "q_lora_rank", "qk_nope_head_dim", "v_head_dim",
    "linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_d_ssm", "mamba_d_state",
    "mamba_head_dim", "ssm_state_size", "state_size",
)  # fmt: skip
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}
"""The one size of latent attention that vLLM's CPU kernel has: DeepSeek's own."""
_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
"""As published; vLLM refuses windows in some layers of Qwen."""
_OTHERS: dict[str, dict[str, Any]] = {
    "DeepSeek V2": {**_LATENT, "n_group": 1},
    "DeepSeek V3": {**_LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "Mamba 2": {"head_dim": 64, "intermediate_size": 256},
    "GPT-NeoX": {"num_key_value_heads": 4},
    "Llama 4": {"attention_chunk_size": 128, "num_experts_per_tok": 1},
    "LFM2": {
        "conv_dim": 128,
        "conv_dim_out": 128,
        "block_dim": 128,
        "block_ff_dim": 192,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
    },
    # vLLM lets a token of Cohere 2 see one more than the window says, transformers does not.
    "Cohere 2": {"sliding_window": 256},
    # transformers raises steps to this, vLLM does not; a trained model has none so small.
    "Nemotron-H": {"time_step_min": 1e-9},
    "Qwen2": _NO_WINDOW,
    "Qwen3": _NO_WINDOW,
}
"""What is not four times as wide."""

_ROPE = {"rope_theta": 10_000.0, "original_max_position_embeddings": 64}
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama with YaRN": (
        "Llama", {"rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0}}
    ),
    "Llama 3.1": (
        "Llama",
        {
            "rope_parameters": {
                **_ROPE, "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
}  # fmt: skip
"""Families with what their longer or later members have: positions beyond the 64 of before."""
TEACHERS = (*FAMILIES, *_VARIANTS)


def save_teacher(name: str, folder: Path) -> None:
    """Write a random float32 teacher and a tokenizer of as many words.

    Args:
        name: of `TEACHERS`.
        folder: is made.
    """
    family, more = _VARIANTS.get(name, (name, {}))
    model = family_model(family, **_wider(FAMILIES[family]) | _OTHERS.get(family, {}) | more)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _wider(make: Callable[..., Any]) -> dict[str, Any]:
    text = make().get_text_config()
    found = {name: getattr(text, name, None) for name in _WIDTHS}
    wider = {name: _TIMES * width for name, width in found.items() if isinstance(width, int)}
    common = {"vocab_size": VOCAB, "max_position_embeddings": 256, "initializer_range": 0.12}
    return common | wider


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"word{number}": number for number in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="word0", bos_token="word1", eos_token="word2"
    )
