"""Which way a GPU reduces logits, the compiled chains, and the bytes of a row; without Triton."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from pipeline.loss.gpu.compiled import Compiled
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.noise import row_noise
from pipeline.sampling.quantisation import SAMPLED_QUANTISATION
from pipeline.teacher.sparsify.device import SparseScheme, sparsify
from pipeline.teacher.sparsify.gpu import chains, choice
from pipeline.teacher.sparsify.gpu.plan import bytes_of_row, candidate_places, not_covered

GRID = (1.0, 2.0)
SCHEMES = {
    "top-9": SparseScheme(9, GRID),
    "threshold": SparseScheme(0, (1.0,), InclusionRule((1.0,), (1 / 28,)), SAMPLED_QUANTISATION),
    "threshold of two": SparseScheme(
        0, GRID, InclusionRule(GRID, (1 / 9, 1 / 23.5)), SAMPLED_QUANTISATION
    ),
    "top-1 sampled": SparseScheme(
        1, (1.0,), InclusionRule((1.0,), (1 / 112,)), SAMPLED_QUANTISATION
    ),
    "top-9 sampled": SparseScheme(
        9, (0.5, 1.0, 3.0), InclusionRule((0.5, 1.0, 3.0), (0, 1 / 9, 1 / 23.5))
    ),
}


def _case(rows: int = 9, vocab: int = 1501) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    logits_RV = torch.randn(rows, vocab, generator=draw) * torch.linspace(0.3, 6, rows)[:, None]
    label_R = torch.randint(vocab, (rows,), generator=draw)
    return logits_RV, label_R, torch.from_numpy(row_noise(3, np.arange(rows)))


@pytest.mark.parametrize("name", SCHEMES)
def test_chains_are_the_cpus_and_compiled_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the other order of sums; what is drawn turns where a rounding crosses a mark."""
    scheme = SCHEMES[name]
    logits_RV, label_R, noise_R = _case()
    there_RC = chains.chained_sparsify(logits_RV, label_R, scheme, noise_R, compiled=False)
    start, places = 2 + 2 * len(scheme.temperatures), scheme.always_kept_places
    count = places + scheme.sampled_places
    (ids, values), (cpu_ids, cpu_values) = (
        _by_id(columns_RC[:, start:], places, count)
        for columns_RC in (there_RC, sparsify(logits_RV, label_R, scheme, noise_R))
    )
    same_R = (ids == cpu_ids).all(-1)
    assert torch.equal(ids[:, :places], cpu_ids[:, :places])
    assert (~same_R).sum() <= (0 if scheme.rule is None else 3)
    torch.testing.assert_close(cpu_values[same_R], values[same_R], atol=1e-5, rtol=0)
    cpu_RC = sparsify(logits_RV, label_R, scheme, noise_R)
    torch.testing.assert_close(cpu_RC[:, :start], there_RC[:, :start], atol=1e-5, rtol=1e-5)
    sums, steps = (Compiled(f, backend="aot_eager") for f in (chains._sums, chains._steps))
    monkeypatch.setattr(chains, "_SUMS", sums)
    monkeypatch.setattr(chains, "_STEPS", steps)
    traced_RC = chains.chained_sparsify(logits_RV, label_R, scheme, noise_R)
    assert not sums.failed
    assert not steps.failed
    torch.testing.assert_close(traced_RC, there_RC, atol=1e-5, rtol=0)


def _by_id(entries_RE: torch.Tensor, places: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and values, always-kept places by id, sampled ones as they are."""
    ids_RP, values_RP = entries_RE[:, :count], entries_RE[:, count:]
    order_RP = torch.arange(count).repeat(len(ids_RP), 1)
    order_RP[:, :places] = ids_RP[:, :places].argsort(-1)
    return ids_RP.gather(1, order_RP), values_RP.gather(1, order_RP)


@pytest.mark.parametrize(
    ("scheme", "vocab", "element", "reason"),
    [
        (SCHEMES["threshold of two"], 262_208, "bfloat16", None),
        (SparseScheme(512, GRID), 1 << 20, "float32", None),
        (SparseScheme(513, GRID), 5000, "float32", "top-513, above 512"),
        (SparseScheme(5, (0.5, 1.0, 2.0, 3.0)), 5000, "float16", None),
        (SparseScheme(5, (0.5, 2.0, 3.0, 4.0)), 5000, "float16", "more than 4 temperatures"),
        (SparseScheme(5, GRID), 5000, "float64", "logits of type float64"),
        (SparseScheme(5, GRID), (1 << 24) + 1, "float32", "a vocabulary of 16,777,217 tokens"),
    ],
)
def test_what_the_kernels_cover(
    scheme: SparseScheme, vocab: int, element: str, reason: str | None
) -> None:
    assert not_covered(scheme, vocab=vocab, element=element) == reason


def test_chains_serve_where_kernels_do_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without Triton, with one that fails, and for what it does not cover; told once each."""
    scheme = SCHEMES["threshold"]
    inputs = _case()
    plain = chains.chained_sparsify
    there_RC = plain(inputs[0], inputs[1], scheme, inputs[2], compiled=False)
    monkeypatch.setattr(choice, "chained_sparsify", lambda *args: plain(*args, compiled=False))
    choice._say.cache_clear()

    def reduced() -> torch.Tensor:
        return choice.sparsify_on_gpu(inputs[0], inputs[1], scheme, inputs[2])

    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(choice, "_has_triton", lambda: False)
        assert torch.equal(reduced(), there_RC)
        monkeypatch.setattr(choice, "_has_triton", lambda: True)
        monkeypatch.setattr(choice, "_State", type("State", (), {"failed": False}))
        # Without Triton the import fails; with it, it finds no GPU.
        for _ in range(3):
            assert torch.equal(reduced(), there_RC)
    assert choice._State.failed
    first, second = (record.message for record in caplog.records)
    assert first.endswith("several times as slowly: Triton is not installed")
    assert "Error: " in second
    choice._say.cache_clear()


def test_memory_that_ends_is_not_the_kernels_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine asks for smaller pieces then, and the kernels go on."""
    import sys
    from types import SimpleNamespace

    def full(*args: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    name = "pipeline.teacher.sparsify.gpu.launch"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(triton_sparsify=full))
    monkeypatch.setattr(choice, "_has_triton", lambda: True)
    inputs = _case()
    with pytest.raises(torch.OutOfMemoryError):
        choice.sparsify_on_gpu(inputs[0], inputs[1], SCHEMES["threshold"], inputs[2])
    assert not choice._State.failed


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_two_reads_of_the_logits_and_little_more(name: str, element_bytes: int) -> None:
    """Three where a top-k of more than one entry decides what else may be drawn."""
    scheme = SCHEMES[name]
    row = bytes_of_row(scheme, vocab=151_936, element_bytes=element_bytes)
    reads = row / (151_936 * element_bytes)
    three = scheme.rule is not None and scheme.top_k > 1
    assert 2 + three < reads < 2.05 + three


def test_places_for_candidates_are_a_power_of_2_and_several_times_k() -> None:
    for top_k in (1, 63, 64, 65, 512):
        places = candidate_places(top_k)
        assert places & (places - 1) == 0
        assert places >= max(256, 4 * top_k)
