"""The fused head against directional finite differences in float64, for all kinds of targets.

`torch.autograd.gradcheck` runs backward twice through one graph, which the head rejects; a random
direction checks all inputs at once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.loss.fused import FusedSpec, fused_head_loss
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets

MakeTargets = Callable[..., tuple[HeadTargets, Tensor]]
KINDS = ("ragged", "empty", "one", "always_kept", "all")
STEP = 1e-5


def _counts(kind: str, tokens: int, vocab: int) -> list[int]:
    return {
        "ragged": [n % (vocab + 1) for n in range(tokens)],
        "empty": [0] * tokens,
        "one": [1] * tokens,
        "always_kept": [1] * tokens,
        "all": [vocab] * tokens,
    }[kind]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 6),
    vocab=st.integers(2, 15),
    temperature=st.sampled_from([1.0, 2.0, 0.7]),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    tail=st.sampled_from(["bucket", "renormalise", "zero"]),
    divergence=st.sampled_from(["forward_kl", "jensen_shannon", "skew_kl", "uld"]),
    outside=st.integers(0, 3),
    padding=st.integers(0, 3),
    softcap=st.sampled_from([None, 4.0]),
    bias=st.booleans(),
    chunk_rows=st.integers(1, 7),
)
def test_any_direction(
    make_targets: MakeTargets,
    seed: int,
    kind: str,
    tokens: int,
    vocab: int,
    temperature: float,
    alpha: float,
    tail: str,
    divergence: str,
    outside: int,
    padding: int,
    softcap: float | None,
    bias: bool,
    chunk_rows: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    across = divergence == "uld"
    targets, _ = make_targets(
        generator, tokens=tokens, vocab=vocab, counts=_counts(kind, tokens, vocab),
        temperature=1.0 if across else temperature,
    )  # fmt: skip
    if kind == "always_kept":
        zeros = torch.zeros(tokens)
        targets = targets._replace(logprobs_NK=zeros[:, None], log_z_N=zeros)
    student = max(1, vocab - outside)
    targets = targets._replace(label_N=targets.label_N % student)
    spec = FusedSpec(
        LossSpec(1.0, alpha, cross_tokenizer="uld")
        if across
        else LossSpec(temperature, alpha, tail, divergence),  # type: ignore[arg-type]
        chunk_rows=chunk_rows,
        softcap=softcap,
        valid_vocab=student,
    )
    shapes = [(tokens, 4), (student + padding, 4), (student + padding,)][: 3 if bias else 2]

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    leaves, direction = draw(), draw()

    def loss(values: list[Tensor]) -> Tensor:
        hidden_ND, weight_VD, *rest = values
        return fused_head_loss(
            hidden_ND, weight_VD, rest[0] if rest else None, targets, spec=spec
        ).loss

    moved = [
        [leaf + sign * STEP * d for leaf, d in zip(leaves, direction, strict=True)]
        for sign in (1, -1)
    ]
    slope = float(loss(moved[0]) - loss(moved[1])) / (2 * STEP)
    wanting = [leaf.clone().requires_grad_() for leaf in leaves]
    loss(wanting).backward()
    found = 0.0
    for leaf, d in zip(wanting, direction, strict=True):
        assert leaf.grad is not None
        found += float((leaf.grad * d).sum())
    assert found == pytest.approx(slope, rel=2e-4, abs=2e-5)
    assert wanting[1].grad is not None
    assert not wanting[1].grad[student:].any(), "padding rows of the head"
