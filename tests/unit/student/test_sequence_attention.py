"""Attention by sequence: what a mask of all sequences computes; windows; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from pipeline.errors import ModelError
from pipeline.student.sequence.attention import SequenceAttention, attention_by_sequence
from pipeline.student.sequence.trial import trial_lengths

LENGTHS = (7, 1, 12, 3)


def masked(
    query_1HTd: torch.Tensor, key_1HTd: torch.Tensor, value_1HTd: torch.Tensor, window: int | None
) -> torch.Tensor:
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(sum(LENGTHS))
    distance = place[:, None] - place[None, :]
    mask = (owner[:, None] == owner[None, :]) & (distance >= 0)
    if window is not None:
        mask &= distance < window
    groups = query_1HTd.shape[1] // key_1HTd.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key_1HTd, value_1HTd))
    output = functional.scaled_dot_product_attention(query_1HTd, key, value, mask, scale=0.3)
    return output.transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 4, 5, 12])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_as_with_a_mask(window: int | None, kv_heads: int) -> None:
    torch.manual_seed(0)
    heads = (4, kv_heads, kv_heads)
    states = [torch.randn(1, h, sum(LENGTHS), 8, requires_grad=True) for h in heads]
    found = attention_by_sequence(*states, LENGTHS, scaling=0.3, sliding_window=window)
    expected = masked(*states, window)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), states)
    theirs = torch.autograd.grad((expected * weight).sum(), states)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_heads_are_left_to_the_model_to_flatten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' own attentions do: GPT-2 flattens the last two axes, whatever they are."""
    attention, states = SequenceAttention(None), torch.arange(24.0).reshape(1, 2, 3, 4)

    def exchanged(_module: Any, query_1HSd: torch.Tensor, *_: Any, **__: Any) -> Any:
        return query_1HSd.transpose(1, 2).flatten(2), None  # as DeepSpeed returns it

    monkeypatch.setattr(attention, "_exchange", lambda *_: exchanged)
    found, _ = attention(torch.nn.Linear(1, 1), states, states, states, None)
    assert torch.equal(found, states.transpose(1, 2))


@pytest.mark.parametrize("name", ["position_bias", "s_aux"])
def test_more_than_causal_attention_is_refused(name: str) -> None:
    attention, states = SequenceAttention(None), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ModelError, match=f"Linear passes {name} to its attention; expected"):
        attention(torch.nn.Linear(1, 1), states, states, states, None, **{name: states})


def test_capped_scores_are_refused_without_flash_attention() -> None:
    attention, states = SequenceAttention(None), torch.zeros(1, 2, 3, 4)
    attention.lengths = (3,)
    with pytest.raises(ModelError, match="Linear caps its scores, which sdpa does not"):
        attention._attend(torch.nn.Linear(1, 1), states, states, states, None, softcap=50.0)


@pytest.mark.parametrize(("window", "first"), [(None, 11), (4, 11), (40, 43), (1 << 20, 11)])
@pytest.mark.parametrize("size", [2, 8])
def test_the_trial_sees_a_window_slide(window: int | None, first: int, size: int) -> None:
    config: Any = type("Config", (), {"sliding_window": window})()
    model: Any = type("Model", (), {"config": config})()
    lengths = trial_lengths(model, size)
    assert lengths[0] == first
    assert sum(lengths) % size == 0
