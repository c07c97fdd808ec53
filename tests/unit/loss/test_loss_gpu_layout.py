"""What the head does on a GPU alone, shown on a CPU: widths, rows, sums, compiled entries."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.loss import fused
from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.entry_gradient import read_entries
from pipeline.loss.fused import FusedSpec, fused_head_loss
from pipeline.loss.gpu import products
from pipeline.loss.gpu.chunks import aligned, chunk_layout
from pipeline.loss.gpu.compiled import Compiled
from pipeline.loss.gpu.finish import ExpSums, finish_entries
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from pipeline.observe.devices import DEVICES
from tests.bench import head_gpu

MakeTargets = Callable[..., tuple[HeadTargets, Tensor]]
GIB = 1 << 30
SPEC = FusedSpec(LossSpec(temperature=2.0, alpha=0.5), chunk_rows=4)
VOCABULARIES = {151_669: 151_936, 151_665: 152_064, 262_145: 262_208, 49_152: 49_152}
"""Tokens of Qwen3, Qwen2.5, Gemma 3 and SmolLM2, and rows of their heads."""


def layout(vocab: int, head_rows: int, **changes: Any) -> Any:
    return chunk_layout(
        **{
            "chunk_rows": None, "vocab": vocab, "head_rows": head_rows, "element_bytes": 2,
            "device_bytes": 80 * GIB, **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_rows_of_logits_begin_at_multiples_of_64(vocab: int) -> None:
    found = layout(vocab, VOCABULARIES[vocab])
    assert found.stride % 64 == 0
    assert found.products == found.stride == aligned(vocab)
    assert found.vocab == vocab
    narrow = layout(vocab, vocab)  # the head has no rows to spare
    assert (narrow.products, narrow.stride) == (vocab, aligned(vocab))


def test_on_a_cpu_nothing_is_aligned() -> None:
    found = layout(151_669, 151_936, device_bytes=None)
    assert (found.rows, found.products, found.stride) == (512, 151_669, 151_669)
    assert layout(151_669, 151_936, device_bytes=None, chunk_rows=7).rows == 7


def test_rows_of_a_chunk_are_chosen_by_bytes() -> None:
    assert layout(151_669, 151_936).rows == 4096
    small = layout(262_145, 262_208, device_bytes=24 * GIB)
    assert 1024 < small.rows < 2048
    assert small.rows % 128 == 0
    assert small.bytes(2) <= 24 * GIB / 32
    capped = layout(262_145, 262_208, device_bytes=24 * GIB, arrays=2, element_bytes=4)
    assert 4 * capped.rows == pytest.approx(small.rows, abs=512)
    assert layout(10**7, 10**7, device_bytes=GIB).rows == 128
    assert layout(151_669, 151_936, chunk_rows=256).rows == 256


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], int]]:
    """Lay chunks out as on 80 GB; return shape and row stride of the logits of each chunk."""
    seen = []

    def watched(logits_NV: Tensor, *args: Any, **options: Any) -> Any:
        seen.append((tuple(logits_NV.shape), logits_NV.stride(0)))
        return sparse_loss_(logits_NV, *args, **options)

    monkeypatch.setattr(fused, "device_bytes", lambda device: 80 * GIB)
    monkeypatch.setattr(fused, "sparse_loss_", watched)
    return seen


@pytest.mark.parametrize("head_rows", [71, 100, 128, 150])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_aligned_products_change_no_gradient(
    make_targets: MakeTargets,
    generator: torch.Generator,
    as_on_a_gpu: list[tuple[tuple[int, ...], int]],
    monkeypatch: pytest.MonkeyPatch,
    head_rows: int,
    softcap: float | None,
) -> None:
    """Against the narrow buffer: the same losses and gradients, and none in the padding."""
    targets, _ = make_targets(generator, tokens=10, vocab=71, temperature=2.0)
    spec = replace(SPEC, valid_vocab=71, softcap=softcap)
    start = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((10, 6), (head_rows, 6), (head_rows,))
    ]
    found = []
    for narrow in (False, True):
        if narrow:
            monkeypatch.setattr(fused, "device_bytes", lambda device: None)
        leaves = [tensor.clone().requires_grad_() for tensor in start]
        terms = fused_head_loss(*leaves, targets, spec=spec, predictions=True)
        terms.loss.backward()
        found.append([terms.loss.detach(), terms.argmax_N, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(found[0], found[1])
    assert not found[0][3][71:].any()
    assert not found[0][4][71:].any()
    strides = {stride for _, stride in as_on_a_gpu[:3]}
    assert strides == {128}, "rows of the logits are 128 elements apart"
    assert [shape for shape, _ in as_on_a_gpu[:3]] == [(4, 71), (4, 71), (2, 71)]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("vocab", [71, 20])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_rows_of_no_token_reach_no_gradient(
    make_targets: MakeTargets, generator: torch.Generator, vocab: int, junk: float
) -> None:
    """They come into the aligned products, and may hold anything."""
    targets, _ = make_targets(generator, tokens=10, vocab=vocab, temperature=2.0)
    shapes = ((10, 6), (150, 6), (150,))
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    found = []
    for value in (0.0, junk):
        leaves = [tensor.clone() for tensor in start]
        for padded in leaves[1:]:
            padded[vocab:] = value
        leaves = [leaf.requires_grad_() for leaf in leaves]
        terms = fused_head_loss(*leaves, targets, spec=replace(SPEC, valid_vocab=vocab))
        terms.loss.backward()
        found.append([terms.loss.detach(), *(leaf.grad for leaf in leaves)])
    assert found[1][1] is not None
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_without_a_setting_all_tokens_are_one_chunk(
    make_targets: MakeTargets,
    generator: torch.Generator,
    as_on_a_gpu: list[tuple[tuple[int, ...], int]],
) -> None:
    """600 rows would be two chunks on a CPU."""
    targets, _ = make_targets(generator, tokens=600, vocab=9)
    hidden, weight = torch.randn(600, 4), torch.randn(9, 4)
    spec = replace(SPEC, chunk_rows=None)
    fused_head_loss(hidden, weight.requires_grad_(), None, targets, spec=spec)
    assert [shape for shape, _ in as_on_a_gpu] == [(600, 9)]


class _Made(TorchDispatchMode):
    """Counts the 16-bit arrays of a size that operations make."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.bfloat16 and out.numel() == self.numel:
            self.count += out.untyped_storage().nbytes() == 2 * self.numel
        return out


def test_a_16_bit_weights_gradient_goes_straight_into_the_sum(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """No temporary of the weight's size, and no rounding before the sum."""
    grads = torch.randn(3, 5, 40, generator=generator).bfloat16()
    hidden = torch.randn(3, 5, 8, generator=generator).bfloat16()
    exact = torch.einsum("cnp,cnd->pd", grads.double(), hidden.double())
    errors, temporaries = [], []
    for wide in (False, True):
        if wide:
            monkeypatch.setattr(products, "_sums_wide", lambda device, dtype: True)
            monkeypatch.setattr(
                products, "_add_wide_",
                lambda sum_PD, a, b, beta: sum_PD.addmm_(a.float(), b.float(), beta=beta),
            )  # fmt: skip
        total = torch.full((40, 8), torch.nan)
        with _Made(40 * 8) as made:
            for chunk in range(3):
                products.add_product_(total, grads[chunk], hidden[chunk], first=chunk == 0)
        errors.append(float((total.double() - exact).norm() / exact.norm()))
        temporaries.append(made.count)
    assert temporaries == [3, 0]
    assert errors[0] > 1e-3
    assert errors[1] < 1e-6


def test_a_torch_that_cannot_is_found_out() -> None:
    """The CPU of torch 2.13 has no such product: the probe says so instead of raising."""
    assert not products._adds_in_place(torch.device("cpu"), torch.bfloat16)
    assert not products._sums_wide(torch.device("cpu"), torch.bfloat16)


def _entries_both_ways(
    read: Any, finish: Any, make_targets: MakeTargets, *, tokens: int, sampled: bool
) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(tokens)
    targets, _ = make_targets(
        generator, tokens=tokens, vocab=30, temperature=2.0, inclusion=sampled
    )
    spec = LossSpec(2.0, 0.4)
    logits_NV = torch.randn(tokens, 64, generator=generator)[:, :30]
    found = []
    for reader, finisher in ((read, finish), (read_entries, finish_entries)):
        x_NV = logits_NV.clone()
        entries, hide_NK = reader(x_NV, targets, spec, dtype=torch.float32)
        x_NV.scatter_add_(1, entries.ids_NK, hide_NK)
        max_N = x_NV.amax(-1)
        below_NV = x_NV - max_N[:, None]
        sums = ExpSums(max_N, (below_NV / 2).exp().sum(-1), below_NV.exp().sum(-1))
        found.append(
            finisher(
                entries, sums, targets, spec, vocab_size=30, gradient=True, dtype=torch.bfloat16
            )
        )
    return found[0], found[1]


@pytest.mark.parametrize("sampled", [False, True])
def test_operations_on_entries_are_one_graph_for_all_sizes(
    make_targets: MakeTargets, sampled: bool
) -> None:
    """Traced as Inductor would get them: no break, and no second graph for other numbers."""
    counts = []

    def backend(graph: Any, _: Any) -> Any:
        counts.append(
            sum(node.op in ("call_function", "call_method") for node in graph.graph.nodes)
        )
        return graph.forward

    read, finish = (
        Compiled(read_entries, backend=backend),
        Compiled(finish_entries, backend=backend),
    )
    for tokens in (11, 7, 9):
        ours, plain = _entries_both_ways(read, finish, make_targets, tokens=tokens, sampled=sampled)
        torch.testing.assert_close(ours, plain)
    assert not read.failed
    assert not finish.failed
    assert len(counts) == 2
    assert sum(counts) > 50, "which a GPU would launch one by one"


class _Operations(TorchDispatchMode):
    """Counts what a GPU would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_costs_of_the_head_are_estimated_from_what_is_counted(make_targets: MakeTargets) -> None:
    for name, sampled in (("top-k", False), ("sampled", True)):
        counted = _Operations()

        def watched(function: Any, counted: Any = counted) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                with counted:
                    return function(*args, **options)

            return call

        _entries_both_ways(
            watched(read_entries), watched(finish_entries), make_targets, tokens=9, sampled=sampled
        )
        assert counted.count == head_gpu.OPERATIONS[name]
    costs = {
        now: head_gpu.estimate(DEVICES["h100"], tokens=8192, vocab=151_669, hidden=2048, now=now)
        for now in (False, True)
    }
    assert costs[False].over_products > 2
    assert costs[True].over_products < 1.25
    assert costs[True].products == costs[False].products


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True])
def test_inductor_makes_few_kernels_of_them(make_targets: MakeTargets, sampled: bool) -> None:
    from torch._inductor import metrics

    torch._dynamo.reset()
    metrics.reset()
    read, finish = Compiled(read_entries), Compiled(finish_entries)
    ours, plain = _entries_both_ways(read, finish, make_targets, tokens=11, sampled=sampled)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    most = head_gpu.COMPILED["sampled" if sampled else "top-k"]
    assert 0 < metrics.generated_kernel_count <= most


def test_what_cannot_be_compiled_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no C compiler found")

    double = Compiled(lambda x: x * 2, backend=broken)
    with caplog.at_level(logging.WARNING):
        assert [float(double(torch.tensor(2.0))) for _ in range(3)] == [4.0, 4.0, 4.0]
    assert double.failed
    assert len(caplog.records) == 1
    assert "no C compiler found" in caplog.text
