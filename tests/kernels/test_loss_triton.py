"""The Triton kernels in Triton's interpreter, against the torch implementation and float64.

`make test-triton` puts Triton on the path and sets TRITON_INTERPRET=1. That shows that the numbers
are right; the last test, that a GPU's compiler takes the kernels. Neither shows speed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.loss import reference
from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.on_policy.written_token import written_token_targets
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from tests.stage_runner import ROOT

pytestmark = pytest.mark.triton

CASES = [
    *((divergence, "auto", sampled, temperature)
      for divergence in ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl")
      for sampled in (False, True)
      for temperature in (1.0, 2.0, 0.7)),
    ("forward_kl", "zero", False, 2.0),
    ("forward_kl", "zero", True, 2.0),
    ("forward_kl", "renormalise", False, 2.0),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "run `make test-triton`"
    # More than one block, and a part of one, in a small vocabulary.
    monkeypatch.setattr("pipeline.loss.chunk_gradient_triton._BLOCK", 64)


def make(seed: int, *, tokens: int, vocab: int, sampled: bool, temperature: float) -> Any:
    """Return logits, targets of 0 to 9 entries, some of them outside the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    log_p_NV = torch.log_softmax(
        torch.randn(tokens, vocab + 7, generator=generator, dtype=torch.float64) * 2, -1
    )
    width = 9
    ids_NK = torch.stack([
        torch.randperm(vocab + 7, generator=generator)[:width].sort().values for _ in range(tokens)
    ])  # fmt: skip
    logprobs_NK = log_p_NV.gather(1, ids_NK)
    padding_NK = torch.arange(width) >= torch.arange(tokens)[:, None] % (width + 1)
    inclusion_NK = (torch.rand(tokens, width, generator=generator) * 1.4 + 0.2).clamp(max=1)
    targets = HeadTargets(
        ids_NK=ids_NK.masked_fill(padding_NK, 0),
        logprobs_NK=logprobs_NK.masked_fill(padding_NK, -torch.inf).float(),
        inclusion_NK=inclusion_NK.masked_fill(padding_NK, 1.0) if sampled else None,
        log_z_N=torch.logsumexp(log_p_NV / temperature, -1).float(),
        entropy_N=torch.ones(tokens),
        label_N=torch.randint(0, vocab, (tokens,), generator=generator),
    )
    # Label tokens among the entries, too.
    targets.label_N[::2] = targets.ids_NK[::2, 0].clamp(max=vocab - 1)
    return torch.randn(tokens, vocab, generator=generator) * 3, targets


def triton_loss(*args: Any, **options: Any) -> Any:
    from pipeline.loss.chunk_gradient_triton import triton_loss_

    return triton_loss_(*args, **options)


def dense(logits_NV: Tensor, targets: HeadTargets, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Return the reference's divergence and its gradient."""
    leaf = logits_NV.double().requires_grad_()
    reference.loss_sum(leaf, targets, spec).backward()
    assert leaf.grad is not None
    return reference.sparse_divergence(leaf.detach(), targets, spec), leaf.grad


@pytest.mark.parametrize(("divergence", "tail", "sampled", "temperature"), CASES)
def test_float32_is_the_reference(
    divergence: str, tail: str, sampled: bool, temperature: float
) -> None:
    logits_NV, targets = make(0, tokens=11, vocab=150, sampled=sampled, temperature=temperature)
    spec = LossSpec(temperature, 0.4, tail, divergence)  # type: ignore[arg-type]
    divergence_N, grad_NV = dense(logits_NV, targets, spec)
    a, b = logits_NV.clone(), logits_NV.clone()
    terms, torch_terms = triton_loss(a, targets, spec), sparse_loss_(b, targets, spec)
    torch.testing.assert_close(terms.divergence_N.double(), divergence_N, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(a.double(), grad_NV, atol=5e-6, rtol=1e-4)
    torch.testing.assert_close(terms.divergence_N, torch_terms.divergence_N, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(terms.ce_N, torch_terms.ce_N, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampled", [False, True])
def test_16_bit_logits_are_rounded_once(dtype: torch.dtype, sampled: bool) -> None:
    """The stored gradient is within one rounding of the float64 one, label tokens included."""
    logits_NV, targets = make(1, tokens=11, vocab=150, sampled=sampled, temperature=2.0)
    logits_NV = logits_NV.to(dtype)
    # A label token that is all but learnt: what is left of its gradient is a small difference.
    logits_NV[0, targets.label_N[0]] = 14.0
    spec = LossSpec(2.0, 0.5)
    divergence_N, grad_NV = dense(logits_NV, targets, spec)
    buffer = logits_NV.clone()
    terms = triton_loss(buffer, targets, spec)
    assert buffer.dtype == dtype
    torch.testing.assert_close(terms.divergence_N.double(), divergence_N, atol=5e-5, rtol=1e-5)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds: twice the error.
    rtol = 2**-7 if dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(buffer.double(), grad_NV, atol=2e-6, rtol=rtol)


def test_inside_the_fused_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's gradients, chunk by chunk, as on a GPU."""
    from pipeline.loss.fused import FusedSpec, fused_head_loss

    _, targets = make(4, tokens=11, vocab=150, sampled=True, temperature=2.0)
    spec = FusedSpec(LossSpec(2.0, 0.5), chunk_rows=4, softcap=3.0)
    generator = torch.Generator().manual_seed(0)
    grads = []
    for implementation in ("torch", "triton"):
        leaves = [
            torch.randn(shape, generator=generator.manual_seed(0)).requires_grad_()
            for shape in ((11, 8), (150, 8))
        ]
        if implementation == "triton":
            monkeypatch.setattr("pipeline.loss.fused.sparse_loss_", triton_loss)
        fused_head_loss(*leaves, None, targets, spec=spec).loss.backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


def test_predictions_values_only_and_rows_of_a_wider_buffer() -> None:
    logits_NV, targets = make(2, tokens=9, vocab=130, sampled=False, temperature=2.0)
    spec = LossSpec(2.0, 0.5)
    wide = torch.full((9, 200), 7.0)
    wide[:, :130] = logits_NV
    terms = triton_loss(wide[:, :130], targets, spec, predictions=True)
    expected = sparse_loss_(logits_NV.clone(), targets, spec, predictions=True)
    assert torch.equal(terms.argmax_N, expected.argmax_N)
    torch.testing.assert_close(terms.argmax_logprob_N, expected.argmax_logprob_N)
    assert (wide[:, 130:] == 7).all(), "nothing is written past the vocabulary"
    values = triton_loss(logits_NV.clone(), targets, spec, gradient=False)
    assert torch.equal(values.divergence_N, terms.divergence_N)


def test_no_tokens_all_kept_and_far_logits() -> None:
    logits_NV, targets = make(3, tokens=9, vocab=130, sampled=False, temperature=2.0)
    none = triton_loss(logits_NV[:0], targets.rows(0, 0), LossSpec(2.0, 0.5))
    assert none.divergence_N.shape == (0,)
    spec = LossSpec(2.0, 0.5)
    for few_NV in (logits_NV[:, :9] + 1e3, logits_NV[:, :9] - 1e3):
        ids_NK = torch.arange(9).expand(9, 9).contiguous()
        whole = targets._replace(
            ids_NK=ids_NK, logprobs_NK=torch.full((9, 9), -2.0), label_N=torch.arange(9)
        )
        divergence_N, grad_NV = dense(few_NV, whole, spec)
        buffer = few_NV.clone()
        terms = triton_loss(buffer, whole, spec)
        torch.testing.assert_close(terms.divergence_N.double(), divergence_N, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(buffer.double(), grad_NV, atol=2e-5, rtol=1e-3)


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """To machine code of sm_80 and sm_90, by Triton's own compiler and ptxas."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_kernels"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 12


@pytest.mark.parametrize("clip", [None, 1.5])
def test_the_policy_gradient_of_written_tokens_is_the_reference(clip: float | None) -> None:
    logits_NV, targets = make(4, tokens=11, vocab=150, sampled=True, temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    known = {
        name: -3 * torch.rand(11, generator=generator)
        for name in ("label_logprob_N", "written_logprob_N")
    }
    targets = targets._replace(**known)
    spec = LossSpec(1.0, 0.4, divergence="sampled_reverse_kl", importance_clip=clip)
    divergence_N, grad_NV = dense(logits_NV, targets, spec)
    terms = triton_loss(logits_NV, written_token_targets(targets), spec)
    torch.testing.assert_close(terms.divergence_N.double(), divergence_N, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(logits_NV.double(), grad_NV, atol=5e-6, rtol=1e-4)
