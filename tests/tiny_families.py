"""Tiny models of many families, made from transformers' own config classes, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["FAMILIES", "family_model"]

VOCAB = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_HEAD = {"head_dim": 8}
_WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_MAMBA2 = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_chunk_size": 8, "mamba_d_conv": 4, "mamba_expand": 2,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
_SEES = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1,
}  # fmt: skip


def _made(kind: str, **changes: Any) -> Callable[..., Any]:
    def make(**others: Any) -> Any:
        import transformers

        return getattr(transformers, f"{kind}Config")(**{**_COMMON, **changes, **others})

    return make


def _gemma3_wrapper(**others: Any) -> Any:
    import transformers

    text = {**_COMMON, **_HEAD, **_WINDOW, "query_pre_attn_scalar": 8, **others}
    return transformers.Gemma3Config(
        text_config=text, vision_config=_VISION, mm_tokens_per_image=1, initializer_range=0.3,
        **_SEES,
    )  # fmt: skip


FAMILIES: dict[str, Callable[..., Any]] = {
    # A config of the family; arguments stand above what is said here.
    "Llama": _made("Llama", **_HEAD),
    "Qwen2": _made("Qwen2", **_WINDOW, use_sliding_window=True),
    "Qwen2-MoE": _made("Qwen2Moe", **_EXPERTS, shared_expert_intermediate_size=16),
    "Qwen3": _made("Qwen3", **_HEAD, **_WINDOW, use_sliding_window=True),
    "Qwen3-MoE": _made("Qwen3Moe", **_HEAD, **_EXPERTS),
    "Mistral": _made("Mistral", **_HEAD, sliding_window=5),
    "Ministral": _made("Ministral", **_HEAD, **_WINDOW),
    "Mixtral": _made("Mixtral", **_HEAD, **_LOCAL_EXPERTS),
    "SmolLM3": _made("SmolLM3", no_rope_layers=[1, 0, 1, 0]),
    "GPT-2": _made("GPT2", n_embd=32, n_layer=4, n_head=4, n_positions=128),
    "GPT-NeoX": _made("GPTNeoX"),
    "Phi": _made("Phi", num_key_value_heads=4),
    "Phi-3": _made("Phi3", sliding_window=5),
    "Gemma 2": _made("Gemma2", **_HEAD, **_WINDOW, query_pre_attn_scalar=8),
    "Gemma 3": _made("Gemma3Text", **_HEAD, **_WINDOW, query_pre_attn_scalar=8),
    "Gemma 3 that sees": _gemma3_wrapper,
    "OLMo 2": _made("Olmo2"),
    "OLMo 3": _made("Olmo3", **_WINDOW),
    "OLMoE": _made("Olmoe", **_EXPERTS),
    "Granite": _made("Granite", residual_multiplier=0.3),
    "Granite MoE": _made("GraniteMoe", **_LOCAL_EXPERTS),
    "EXAONE 4": _made("Exaone4", **_HEAD, **_WINDOW),
    "Cohere 2": _made("Cohere2", **_HEAD, **_WINDOW),
    "StarCoder 2": _made("Starcoder2", sliding_window=5),
    "Nemotron": _made("Nemotron", **_HEAD),
    "DeepSeek V2": _made("DeepseekV2", **{**_LATENT, "topk_method": "greedy"}),
    "DeepSeek V3": _made("DeepseekV3", **_LATENT),
    "GLM": _made("Glm", **_HEAD),
    "GLM-4": _made("Glm4", **_HEAD),
    "GLM-4-MoE": _made(
        "Glm4Moe", **_HEAD, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, first_k_dense_replace=1, n_group=2, topk_group=1,
    ),
    "gpt-oss": _made("GptOss", **_HEAD, **_LOCAL_EXPERTS, **_WINDOW),
    "Llama 4": _made(
        "Llama4Text", **_HEAD, **_LOCAL_EXPERTS, intermediate_size_mlp=48, attention_chunk_size=40,
        interleave_moe_layer_step=2,
    ),
    "Falcon-H1": _made("FalconH1", **_MAMBA2, mamba_d_ssm=64),
    "Granite hybrid": _made(
        "GraniteMoeHybrid", **_MAMBA2, num_local_experts=0, num_experts_per_tok=0,
        shared_intermediate_size=48, layer_types=["mamba", "attention"] * 2,
    ),
    "Bamba": _made("Bamba", **_MAMBA2, attn_layer_indices=[1, 3]),
    "Nemotron-H": _made(
        "NemotronH", hybrid_override_pattern="M*M-", layers_block_type=None, mamba_num_heads=4,
        mamba_head_dim=16, ssm_state_size=8, n_groups=1, chunk_size=8, head_dim=8,
    ),
    "Qwen3-Next": _made("Qwen3Next", **_HEAD, **_EXPERTS, **_LINEAR,
                        shared_expert_intermediate_size=16),
    "Qwen3.5": _made("Qwen3_5Text", **_HEAD, **_LINEAR),
    "LFM2": _made("Lfm2", layer_types=["conv", "full_attention"] * 2,
                  block_auto_adjust_ff_dim=False),
    "Jamba": _made("Jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=4,
                   expert_layer_period=2, mamba_d_state=8, use_mamba_kernels=False),
    "MiniMax": _made("MiniMax", **_HEAD, **_LOCAL_EXPERTS, block_size=8,
                     layer_types=["linear_attention", "full_attention"] * 2),
    "OLMo hybrid": _made("OlmoHybrid", **_LINEAR),
    "RecurrentGemma": _made("RecurrentGemma", lru_width=32, attention_window_size=64,
                            block_types=["recurrent", "attention"]),
    "Mamba": _made("Mamba", state_size=4),
    "Mamba 2": _made("Mamba2", state_size=8, num_heads=4, head_dim=16, expand=2, n_groups=1,
                     chunk_size=8),
}  # fmt: skip


def family_model(name: str, *, attention: str | None = None, **changes: Any) -> Any:
    """Return a random float32 model of a family, with norms that are not all ones.

    Args:
        name: of `FAMILIES`.
        attention: transformers' name; None: what transformers takes itself.
        changes: of the config.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        FAMILIES[name](**changes), dtype=torch.float32, attn_implementation=attention
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.config.use_cache = False
    return model.eval()
