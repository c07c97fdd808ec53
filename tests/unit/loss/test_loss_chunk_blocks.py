"""The chunk loss on a CPU: blocks of rows and the threads that take them change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.loss import chunk_gradient
from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets

MakeTargets = Callable[..., tuple[HeadTargets, Tensor]]


def test_blocks_do_not_change_the_result(
    make_targets: MakeTargets, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row per block gives the same numbers as all rows at once."""
    targets, _ = make_targets(generator, tokens=11, vocab=40, temperature=2.0)
    logits_NV = torch.randn(11, 40, generator=generator)
    spec = LossSpec(2.0, 0.5)
    a, b = logits_NV.clone(), logits_NV.clone()
    terms_a = sparse_loss_(a, targets, spec)
    monkeypatch.setattr(chunk_gradient, "_CPU_BLOCK_BYTES", 1)
    monkeypatch.setattr(chunk_gradient, "_CPU_BLOCK_ROWS", 1)
    terms_b = sparse_loss_(b, targets, spec)
    torch.testing.assert_close(terms_a.divergence_N, terms_b.divergence_N, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_any_number_of_threads_gives_the_same_bits(
    make_targets: MakeTargets, generator: torch.Generator, divergence: str, dtype: torch.dtype
) -> None:
    """Threads take whole blocks: how many there are changes neither values nor gradient."""
    targets, _ = make_targets(generator, tokens=75, vocab=700)
    logits_NV = (torch.randn(75, 700, generator=generator) * 3).to(dtype)
    spec = LossSpec(2.0, 0.7, divergence=divergence)  # type: ignore[arg-type]
    found = []
    before = torch.get_num_threads()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunk_gradient, "_CPU_BLOCK_BYTES", 1)  # blocks of 16 rows
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                seen: set[int] = set()
                real = chunk_gradient._block_

                def noted(*arguments: Any, real: Any = real, seen: set[int] = seen) -> Any:
                    seen.add(torch.get_num_threads())
                    return real(*arguments)

                patch.setattr(chunk_gradient, "_block_", noted)
                buffer = logits_NV.clone()
                found.append((buffer, sparse_loss_(buffer, targets, spec, predictions=True)))
                patch.setattr(chunk_gradient, "_block_", real)
                assert seen == {1}, "an operation waits for no other thread"
                assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    (gradient, terms), *others = found
    for other, more in others:
        assert torch.equal(other, gradient)
        for a, b in zip(terms, more, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
