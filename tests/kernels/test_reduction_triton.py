"""The reduction's Triton kernels in Triton's interpreter, against the torch implementation.

`make test-triton` puts Triton on the path and sets TRITON_INTERPRET=1. Numbers agree within
`TOLERANCE`. Ids agree but where a difference of that size turns a rounding; given the same
numbers they agree always, which numpy shows here with the kernels' own statistics.

Legend: R rows, V vocabulary, C columns, P places, K always-kept, D sampled places.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.noise import dither, offset, row_noise
from pipeline.sampling.quantisation import SAMPLED_QUANTISATION
from pipeline.teacher.sparsify.device import SparseScheme
from pipeline.teacher.sparsify.gpu.chains import chained_sparsify
from pipeline.teacher.sparsify.gpu.plan import bytes_of_row, candidate_places
from tests.stage_runner import ROOT

pytestmark = pytest.mark.triton

TOLERANCE = 1e-5
"""Relative for log Z and entropies above 1: sums in another order."""
GRID = (1.0, 2.0)


def threshold(grid: tuple[float, ...], taus: tuple[float, ...], *, top_k: int = 0) -> SparseScheme:
    return SparseScheme(top_k, grid, InclusionRule(grid, taus), SAMPLED_QUANTISATION)


SCHEMES = {
    "top-64": SparseScheme(64, GRID),
    "top-1": SparseScheme(1, (1.0,)),
    "top-5 at four": SparseScheme(5, (0.5, 1.0, 2.0, 10.0)),
    "threshold": threshold((1.0,), (1 / 28,)),
    "threshold at 2": threshold(GRID, (0.0, 1 / 15)),
    "threshold of two": threshold(GRID, (1 / 9, 1 / 23.5)),
    "threshold of two, turned": threshold((2.0, 1.0), (1 / 23.5, 1 / 9)),
    "threshold of three": threshold((0.5, 1.0, 3.0), (1 / 5, 1 / 9, 1 / 23.5)),
    "top-1 sampled": threshold((1.0,), (1 / 112,), top_k=1),
    "top-1 sampled of two": threshold(GRID, (1 / 36, 1 / 94), top_k=1),
    "top-8 sampled": threshold(GRID, (1 / 9, 1 / 23.5), top_k=8),
    "top-64 sampled": threshold((1.0,), (1 / 28,), top_k=64),
}


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "run `make test-triton`"


def make(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Return logits, labels and noise: flat rows, sharp ones, and all between."""
    draw = torch.Generator().manual_seed(vocab)
    width_R1 = torch.linspace(0.3, 6, rows)[:, None]
    logits_RV = (torch.randn(rows, vocab, generator=draw) * width_R1).to(dtype)
    label_R = torch.randint(vocab, (rows,), generator=draw)
    label_R[0] = logits_RV[0].argmax()
    return logits_RV, label_R, torch.from_numpy(row_noise(3, np.arange(rows)))


def kernels(
    logits_RV: torch.Tensor, label_R: torch.Tensor, scheme: SparseScheme, noise_R: torch.Tensor
) -> torch.Tensor:
    from pipeline.teacher.sparsify.gpu.launch import triton_sparsify

    return triton_sparsify(logits_RV, label_R, scheme, noise_R)


def in_torch(
    logits_RV: torch.Tensor, label_R: torch.Tensor, scheme: SparseScheme, noise_R: torch.Tensor
) -> torch.Tensor:
    """Return the columns of the same float32 arithmetic."""
    return chained_sparsify(logits_RV, label_R, scheme, noise_R, compiled=False)


def parts(columns_RC: torch.Tensor, scheme: SparseScheme) -> tuple[torch.Tensor, ...]:
    """Return the numbers, and ids and log p: always-kept ones by id, then sampled ones."""
    first = 2 + 2 * len(scheme.temperatures)
    ids_RP, values_RP = columns_RC[:, first:].chunk(2, dim=-1)
    kept = scheme.always_kept_places
    ids_RK, order_RK = ids_RP[:, :kept].sort(-1)
    return (
        columns_RC[:, :first],
        torch.cat([ids_RK, ids_RP[:, kept:]], -1),
        torch.cat([values_RP[:, :kept].gather(-1, order_RK), values_RP[:, kept:]], -1),
    )


def agree(
    found_RC: torch.Tensor, there_RC: torch.Tensor, scheme: SparseScheme, logits: torch.dtype
) -> None:
    """Compare; of rows with rounding one in ten may differ in its ids."""
    assert found_RC.shape == there_RC.shape
    (numbers, ids, values), (numbers_there, ids_there, values_there) = (
        parts(columns, scheme) for columns in (found_RC, there_RC)
    )
    if scheme.top_k:
        # Of equal logits any may be kept: the values are what must be the largest. What is drawn
        # of the others is compared where that made no difference.
        kept = scheme.always_kept_places
        torch.testing.assert_close(
            values[:, :kept].sort(-1).values, values_there[:, :kept].sort(-1).values,
            atol=TOLERANCE, rtol=0,
        )  # fmt: skip
        same_R = (ids == ids_there).all(-1)
        assert (~same_R).sum() <= len(ids) * (0.1 if logits == torch.float32 else 1)
    else:
        same_R = (ids == ids_there).all(-1)
        assert (~same_R).sum() <= len(ids) / 10
    torch.testing.assert_close(
        numbers[same_R], numbers_there[same_R], atol=TOLERANCE, rtol=TOLERANCE
    )
    torch.testing.assert_close(values[same_R], values_there[same_R], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(130, torch.float16), (5003, torch.float32), (5003, torch.bfloat16)]
)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_torchs(name: str, vocab: int, dtype: torch.dtype) -> None:
    scheme = SCHEMES[name]
    inputs = make(8, vocab, dtype)
    before = inputs[0].clone()
    found_RC = kernels(inputs[0], inputs[1], scheme, inputs[2])
    agree(found_RC, in_torch(inputs[0], inputs[1], scheme, inputs[2]), scheme, dtype)
    assert torch.equal(inputs[0], before)
    if scheme.rule is None and dtype == torch.float32:
        ids = parts(found_RC, scheme)[1].long()
        top_RK = inputs[0].topk(scheme.top_k).indices.sort(-1).values
        assert torch.equal(ids, top_RK)
    if 1.0 in scheme.temperatures:
        assert (found_RC[:, 2 + scheme.temperatures.index(1.0)] == 0).all()


@pytest.mark.parametrize("name", ["top-64", "threshold of two"])
def test_a_row_of_a_large_vocabulary(name: str) -> None:
    scheme, vocab = SCHEMES[name], 262_208
    logits_RV, label_R, noise_R = (part[5:6] for part in make(10, vocab))
    found_RC = kernels(logits_RV, label_R, scheme, noise_R)
    there_RC = in_torch(logits_RV, label_R, scheme, noise_R)
    (numbers, ids, _), (numbers_there, ids_there, _) = (
        parts(columns, scheme) for columns in (found_RC, there_RC)
    )
    torch.testing.assert_close(numbers, numbers_there, atol=TOLERANCE, rtol=TOLERANCE)
    # One row: a rounding that turns moves the draws behind it by one id at most.
    assert (ids != ids_there).sum() <= 2


@pytest.mark.parametrize("name", ["threshold", "threshold of two", "threshold of three"])
def test_ids_are_those_of_the_same_numbers_in_whole_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row may differ: after the steps all is of integers."""
    from pipeline.teacher.sparsify.gpu import launch

    scheme = SCHEMES[name]
    rule = scheme.rule
    assert rule is not None
    states = []
    draw = launch._draw

    def keep_state(*args: Any) -> None:
        states.append(args[4].clone())
        draw(*args)

    monkeypatch.setattr(launch, "_draw", keep_state)
    logits_RV, label_R, noise_R = make(20, 3001)
    columns_RC = kernels(logits_RV, label_R, scheme, noise_R)
    largest_R, log_z_R = states[0].unbind(-1)
    _, ids, values = parts(columns_RC, scheme)
    kept, step = scheme.always_kept_places, np.float32(scheme.quantisation.sampled_step)
    scale = 1 << scheme.step_bits
    for row in range(20):
        log_p_V = (logits_RV[row] - largest_R[row] - log_z_R[row]).numpy()
        log_z_G = columns_RC[row, 2 : 2 + len(scheme.temperatures)].numpy()
        shift = dither(noise_R[row].numpy())
        on_grid_V = np.rint(np.maximum(log_p_V, np.float32(-40)) * np.float32(1 / step) + shift)
        on_grid_V = (on_grid_V - shift) * step
        always_V = _ratio(log_p_V, log_z_G, rule) >= 1
        always_V[label_R[row]] = False
        pi_V = _ratio(on_grid_V, log_z_G, rule) * np.float32(scale) + np.float32(0.5)
        steps_V = np.minimum(pi_V, np.float32(scheme.most_steps)).astype(np.int64)
        steps_V[always_V] = 0
        steps_V[label_R[row]] = 0
        first = (offset(noise_R[row].numpy()) * scale) >> 30
        marks_D = first + scale * np.arange(scheme.sampled_places)
        sampled_D = np.searchsorted(np.cumsum(steps_V), marks_D, side="right")
        sampled_D = sampled_D[sampled_D < 3001]
        found_D = ids[row, kept:]
        assert found_D[found_D >= 0].tolist() == sampled_D.tolist(), row
        assert values[row, kept:][found_D >= 0].tolist() == on_grid_V[sampled_D].tolist()
        found_K = ids[row, :kept]
        assert found_K[found_K >= 0].tolist() == np.flatnonzero(always_V).tolist()


def _ratio(log_p_V: np.ndarray, log_z_G: np.ndarray, rule: InclusionRule) -> np.ndarray:
    """Return the ratio in float32, operation by operation as the kernel has them."""
    single = np.float32
    used = [g for g, tau in enumerate(rule.taus) if tau]
    if [rule.temperatures[g] for g in used] == [1.0, 2.0]:
        half_V = np.exp(log_p_V * single(0.5))
        factor = np.exp(single(-2.0) * log_z_G[used[1]]) * single(1 / rule.taus[used[1]] ** 2)
        return half_V * np.sqrt(half_V * half_V * single(1 / rule.taus[used[0]] ** 2) + factor)
    terms = []
    for g in used:
        shift = log_z_G[g] + single(np.log(rule.taus[g]))
        terms.append(np.maximum(log_p_V * single(1 / rule.temperatures[g]) - shift, single(-40)))
    if len(terms) == 1:
        return np.exp(terms[0])
    total_V = np.exp(terms[0]) ** 2
    for term_V in terms[1:]:
        total_V = total_V + np.exp(term_V) ** 2
    return np.sqrt(total_V)


@pytest.mark.parametrize("name", ["top-64", "threshold", "threshold of two", "top-8 sampled"])
def test_all_mass_on_one_id_and_none_on_any(name: str) -> None:
    scheme = SCHEMES[name]
    _, label_R, noise_R = make(4, 2999)
    logits_RV = torch.zeros(4, 2999)
    logits_RV[0, 2321] = 1e4  # on one, which is not the label
    logits_RV[1, label_R[1]] = 1e4  # on the label
    logits_RV[2] -= 1e4  # on none, far below 0
    logits_RV[3, ::2] = torch.finfo(torch.float32).min  # as masked tokens have it
    found_RC = kernels(logits_RV, label_R, scheme, noise_R)
    assert found_RC.isfinite().all()
    there_RC = in_torch(logits_RV, label_R, scheme, noise_R)
    (numbers, ids, values), (numbers_there, ids_there, values_there) = (
        parts(columns, scheme) for columns in (found_RC, there_RC)
    )
    torch.testing.assert_close(numbers, numbers_there, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(values.sort(-1).values, values_there.sort(-1).values)
    if scheme.rule is not None and not scheme.top_k:
        assert torch.equal(ids, ids_there)


@pytest.mark.parametrize("top_k", [1, 5, 500])
def test_of_equal_logits_the_smaller_ids_are_kept(top_k: int) -> None:
    """Where too many reach the border: all equal, equal by group, and a few levels only."""
    vocab = 6001
    level_V = torch.arange(vocab)
    logits_RV = torch.stack([
        torch.zeros(vocab),
        (level_V % 2048).float(),
        (level_V % 3).float(),
        -(level_V // 1000).float(),
        torch.where(level_V > 5000, 1.0, -0.0),
    ])  # fmt: skip
    scheme = SparseScheme(top_k, (1.0,))
    label_R = torch.zeros(5, dtype=torch.int64)
    found = parts(kernels(logits_RV, label_R, scheme, label_R), scheme)[1].long()
    for row, logits_V in enumerate(logits_RV):
        order = logits_V.argsort(descending=True, stable=True)[:top_k]
        assert found[row].tolist() == sorted(order.tolist()), row
    assert vocab > candidate_places(top_k), "the first row fills all places"


def test_top_k_of_the_whole_vocabulary() -> None:
    logits_RV, label_R, noise_R = make(3, 300)
    scheme = SparseScheme(300, GRID)
    found_RC = kernels(logits_RV, label_R, scheme, noise_R)
    agree(found_RC, in_torch(logits_RV, label_R, scheme, noise_R), scheme, torch.float32)


@pytest.mark.parametrize(
    "name", ["top-64", "threshold", "threshold of two", "top-1 sampled", "top-8 sampled"]
)
def test_rows_that_are_not_finite_say_so_and_change_no_other(name: str) -> None:
    scheme = SCHEMES[name]
    logits_RV, label_R, noise_R = make(9, 2600)
    clean_RC = kernels(logits_RV, label_R, scheme, noise_R)
    for row, bad in enumerate([float("nan"), float("inf"), float("-inf")]):
        logits_RV[row, 17 + 1200 * row] = bad
        logits_RV[row + 3] = bad
    found_RC = kernels(logits_RV, label_R, scheme, noise_R)
    assert found_RC.isfinite().all(-1).tolist() == [False] * 6 + [True] * 3
    assert torch.equal(found_RC[6:], clean_RC[6:])


@pytest.mark.parametrize("name", ["top-64", "threshold of two", "top-1 sampled", "top-8 sampled"])
def test_rows_alone_in_a_wider_buffer_and_at_any_offset(name: str) -> None:
    scheme = SCHEMES[name]
    logits_RV, label_R, noise_R = make(5, 2500)
    whole_RC = kernels(logits_RV, label_R, scheme, noise_R)
    wide_RV = torch.full((5, 2561), 1e9)
    wide_RV[:, :2500] = logits_RV
    assert torch.equal(kernels(wide_RV[:, :2500], label_R, scheme, noise_R), whole_RC)
    spread_RV = torch.full((5, 5000), 1e9)
    spread_RV[:, ::2] = logits_RV
    assert torch.equal(kernels(spread_RV[:, ::2], label_R, scheme, noise_R), whole_RC)
    for row in range(5):
        some = slice(row, row + 1)
        alone_RC = kernels(logits_RV[some], label_R[some], scheme, noise_R[some])
        assert torch.equal(alone_RC, whole_RC[some])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in SCHEMES] + [("threshold of two", torch.bfloat16)],
)
def test_bytes_are_those_that_the_kernels_move(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every load and store of the interpreter is counted; `bench-capture` tells the arithmetic."""
    from triton.runtime.interpreter import InterpreterBuilder

    scheme, vocab = SCHEMES[name], 20_011
    moved = [0]

    def counting(original: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def call(self: Any, ptrs: Any, *args: Any) -> Any:
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            moved[0] += int(np.asarray(args[mask_at].data).sum()) * size
            return original(self, ptrs, *args)

        return call

    for method, mask_at in (("create_masked_load", 0), ("create_masked_store", 1)):
        original = getattr(InterpreterBuilder, method)
        monkeypatch.setattr(InterpreterBuilder, method, counting(original, mask_at))
    rows = 2
    logits_RV, label_R, noise_R = make(rows, vocab, dtype)
    kernels(logits_RV, label_R, scheme, noise_R)
    by_torch = 0
    if (
        scheme.top_k > 1
    ):  # empty keys are written, all are read, the largest and their places written
        by_torch = 16 * candidate_places(scheme.top_k) + 16 * scheme.top_k
    found = moved[0] / rows + by_torch
    said = bytes_of_row(scheme, vocab=vocab, element_bytes=dtype.itemsize)
    assert said * 0.995 <= found <= said * 1.005
    reads = bytes_of_row(scheme, vocab=151_936, element_bytes=4) / (4 * 151_936)
    assert reads <= (3.1 if scheme.rule is not None and scheme.top_k > 1 else 2.05)


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """To machine code of sm_80 and sm_90, by Triton's own compiler and ptxas, without spills."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_reduction"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 18
