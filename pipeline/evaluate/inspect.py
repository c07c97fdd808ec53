"""Inspect a finished student: its top tokens on held-out text, and its answers to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.codec.targets import CachedSequence
from pipeline.models.device import uses_gpu
from pipeline.models.load import load_causal_lm

__all__ = ["TokenComparison", "compare_tokens", "generate_texts", "load_for_inspection"]


@dataclass(frozen=True, slots=True)
class TokenComparison:
    """One token of a held-out sequence."""

    token_id: int
    kl: float | None
    """Nats, over the entries and a tail bucket; None where the token is not supervised."""
    teacher_top: tuple[tuple[int, float], ...] = ()
    student_top: tuple[tuple[int, float], ...] = ()


def load_for_inspection(folder: Path) -> Any:
    """Load a model folder in float32 (CPU) or bfloat16 (GPU) for reading, not training."""
    on_gpu = uses_gpu()
    model = load_causal_lm(folder, dtype="bfloat16" if on_gpu else "float32")
    return model.to("cuda" if on_gpu else "cpu").eval()


def compare_tokens(model: Any, row: CachedSequence, *, top: int = 5) -> list[TokenComparison]:
    """Return each token of `row` with the teacher's and the student's likeliest tokens before it.

    The KL is over the cached entries and one outcome for the rest (see pipeline.loss): a lower
    bound. For sampled targets both use only the always-kept entries: at a single position the
    sampled ones say nothing.
    """
    import torch

    ids_1L = torch.from_numpy(row.input_ids_L.astype(np.int64))[None].to(model.device)
    with torch.no_grad():
        logits_LV = model(input_ids=ids_1L, use_cache=False).logits[0].float()
    log_q_LV = torch.log_softmax(logits_LV, -1).cpu()
    starts = np.concatenate([[0], np.cumsum(row.targets.counts_N)])
    compared: list[TokenComparison] = []
    place = 0
    for position, (token_id, loss_mask) in enumerate(
        zip(row.input_ids_L.tolist(), row.loss_mask_L.tolist(), strict=True)
    ):
        if not loss_mask:
            compared.append(TokenComparison(token_id, None))
            continue
        entries = slice(int(starts[place]), int(starts[place + 1]))
        place += 1
        inclusion_E = row.targets.inclusion_E
        always_kept = slice(None) if inclusion_E is None else inclusion_E[entries] >= 1
        ids = torch.from_numpy(row.targets.token_ids_E[entries][always_kept].astype(np.int64))
        log_p = torch.from_numpy(row.targets.logprobs_E[entries][always_kept].copy())
        log_q_V = log_q_LV[position - 1]
        compared.append(
            TokenComparison(
                token_id,
                _bucket_kl(log_p.double(), log_q_V[ids].double()),
                _largest(ids, log_p, top),
                _largest(torch.arange(log_q_V.numel()), log_q_V, top),
            )
        )
    return compared


def generate_texts(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int
) -> list[str]:
    """Return the greedy answer to each prompt, as a user's turn if there is a chat template."""
    import torch

    texts: list[str] = []
    for prompt in prompts:
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            encoded = tokenizer(prompt, return_tensors="pt")
        encoded = encoded.to(model.device)
        with torch.no_grad():
            output = model.generate(
                **encoded, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True
            )
        new = output[0, encoded["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return texts


def _bucket_kl(log_p_K: Any, log_q_K: Any) -> float:
    p_K, q_K = log_p_K.exp(), log_q_K.exp()
    rest_p = max(1.0 - float(p_K.sum()), 0.0)
    rest_q = max(1.0 - float(q_K.sum()), 1e-12)
    tail = rest_p * float(np.log(rest_p / rest_q)) if rest_p > 0 else 0.0
    return max(float((p_K * (log_p_K - log_q_K)).sum()) + tail, 0.0)


def _largest(ids: Any, logprobs: Any, top: int) -> tuple[tuple[int, float], ...]:
    values, places = logprobs.topk(min(top, logprobs.numel()))
    return tuple(
        (int(ids[place]), float(value.exp())) for value, place in zip(values, places, strict=True)
    )
