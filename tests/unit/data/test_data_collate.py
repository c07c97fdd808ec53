"""Collation: every label, position and entry where it belongs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.collate import collate
from pipeline.data.temperature import interpolated, temperature_index
from pipeline.errors import ConfigError

MakeSource = Callable[..., Any]


@pytest.mark.parametrize("inclusion", [False, True])
def test_everything_is_where_it_belongs(make_source: MakeSource, inclusion: bool) -> None:
    """Walk the rows one token at a time and compare."""
    rows = make_source([9], inclusion=inclusion, seed=2).rows[0]
    batch = collate(rows, temperature=2.0)
    assert batch.num_sequences == 9
    assert batch.lengths == tuple(len(row.input_ids_L) for row in rows)
    assert (batch.inclusion_NK is not None) == inclusion
    n = start = 0
    for index, row in enumerate(rows):
        length = len(row.input_ids_L)
        ids = batch.input_ids_1T[0, start : start + length]
        assert ids.tolist() == row.input_ids_L.tolist()
        assert batch.position_ids_1T[0, start : start + length].tolist() == list(range(length))
        entry = 0
        for k, position in enumerate(np.flatnonzero(row.loss_mask_L)):
            target = row.targets
            # The hidden state one before the token predicts it, within the same sequence.
            label = int(batch.label_index_N[n])
            assert start <= label == start + position - 1
            assert batch.label_ids_N[n] == row.input_ids_L[position]
            assert batch.label_ids_N[n] == batch.input_ids_1T[0, label + 1]
            assert batch.sample_index_N[n] == index
            assert batch.log_z_N[n] == target.log_z_NG[k, 1]
            assert batch.entropy_N[n] == target.entropy_NG[k, 1]
            assert batch.label_logprob_N[n] == target.label_logprob_N[k]
            count = int(target.counts_N[k])
            own = slice(entry, entry + count)
            assert batch.ids_NK[n, :count].tolist() == target.token_ids_E[own].tolist()
            assert batch.logprobs_NK[n, :count].tolist() == target.logprobs_E[own].tolist()
            assert torch.isneginf(batch.logprobs_NK[n, count:]).all()
            if batch.inclusion_NK is not None:
                assert batch.inclusion_NK[n, :count].tolist() == target.inclusion_E[own].tolist()
                assert (batch.inclusion_NK[n, count:] == 1).all()
            entry += count
            n += 1
        start += length
    assert n == batch.num_loss_tokens
    assert start == batch.num_tokens


def test_dtypes(make_source: MakeSource) -> None:
    """Indices are int64, numbers float32."""
    batch = collate(make_source([3]).rows[0], temperature=1.0)
    for name in ("input_ids_1T", "position_ids_1T", "label_index_N", "label_ids_N", "ids_NK"):
        assert getattr(batch, name).dtype == torch.int64, name
    for name in ("logprobs_NK", "log_z_N", "entropy_N", "label_logprob_N"):
        assert getattr(batch, name).dtype == torch.float32, name
    assert batch.to("cpu").ids_NK is batch.ids_NK


def test_empty_batch() -> None:
    """One dummy token, nothing supervised."""
    batch = collate([], temperature=2.0)
    assert batch.input_ids_1T.shape == batch.position_ids_1T.shape == (1, 1)
    assert batch.num_loss_tokens == batch.num_sequences == batch.num_tokens == 0
    assert batch.ids_NK.shape == batch.logprobs_NK.shape == (0, 0)
    # The last step of an epoch has such batches; `loss.importance_clip` asks each for these.
    assert batch.written_logprob_N is not None
    assert batch.written_logprob_N.shape == (0,)


def test_rows_without_supervised_tokens(make_source: MakeSource) -> None:
    """They take part in the batch, with no label."""
    rows = make_source([5], longest=1).rows[0]
    batch = collate(rows, temperature=1.0)
    assert batch.num_tokens == 5
    assert batch.ids_NK.shape == (0, 0)


def test_a_temperature_that_is_not_cached_is_refused(make_source: MakeSource) -> None:
    with pytest.raises(ConfigError, match=r"1\.5 is not in the cache; expected one of 1, 2"):
        collate(make_source([1]).rows[0], temperature=1.5)
    assert temperature_index((0.5, 1.0, 2.0), 2) == 2


@pytest.mark.parametrize("inclusion", [False, True])
def test_a_temperature_off_the_grid_when_asked(make_source: MakeSource, inclusion: bool) -> None:
    """The entries alone are the distribution: their weights sum to 1; entropy is of them."""
    rows = make_source([9], inclusion=inclusion).rows[0]
    batch = collate(rows, temperature=1.5, uncached_temperature="self_normalised")
    log_p_NK = batch.logprobs_NK / 1.5 - batch.log_z_N[:, None]
    weight_NK = log_p_NK.exp()
    if inclusion:
        assert batch.inclusion_NK is not None
        weight_NK = weight_NK / batch.inclusion_NK
    filled_N = torch.isfinite(batch.logprobs_NK).any(-1)
    assert filled_N.any()
    assert not filled_N.all()
    torch.testing.assert_close(weight_NK.sum(-1), filled_N.float())
    entropy_N = -(weight_NK * log_p_NK).nan_to_num(0.0).sum(-1)
    torch.testing.assert_close(batch.entropy_N, entropy_N, atol=1e-5, rtol=1e-5)
    # On the grid nothing is approximated.
    on_grid = collate(rows, temperature=2.0, uncached_temperature="self_normalised")
    assert torch.equal(on_grid.log_z_N, collate(rows, temperature=2.0).log_z_N)


def test_interpolated_between_grid_temperatures(make_source: MakeSource) -> None:
    """Nearer to log Z than the grid's ends by far, equal to them at the ends, refused beyond."""
    z_NV = torch.randn(50, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    grid = (1.0, 2.0, 4.0)

    def both(temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        log_p_NV = torch.log_softmax(z_NV, -1) / temperature
        return log_p_NV.logsumexp(-1), torch.special.entr(torch.softmax(log_p_NV, -1)).sum(-1)

    columns = [both(temperature) for temperature in grid]
    log_z_NG, entropy_NG = (torch.stack(part, -1) for part in zip(*columns, strict=True))
    for temperature in (1.2, 1.5, 3.0):
        log_z_N, entropy_N = interpolated(grid, temperature, log_z_NG, entropy_NG)
        true_log_z_N, true_entropy_N = both(temperature)
        assert (log_z_N - true_log_z_N).square().mean().sqrt() < 0.06
        assert (entropy_N - true_entropy_N).square().mean().sqrt() < 0.25
    near_N, near_entropy_N = interpolated(grid, 2.0 - 1e-7, log_z_NG, entropy_NG)
    torch.testing.assert_close(near_N, log_z_NG[:, 1].float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(near_entropy_N, entropy_NG[:, 1].float(), atol=1e-4, rtol=1e-4)
    for outside in (0.5, 5.0):
        with pytest.raises(ConfigError, match="outside the cache's grid, 1, 2, 4"):
            interpolated(grid, outside, log_z_NG, entropy_NG)
    rows = make_source([9]).rows[0]
    batch = collate(rows, temperature=1.5, uncached_temperature="interpolated")
    tables = [(row.targets.log_z_NG, row.targets.entropy_NG) for row in rows]
    joined = (torch.from_numpy(np.concatenate(part)) for part in zip(*tables, strict=True))
    assert torch.equal(batch.log_z_N, interpolated((1.0, 2.0), 1.5, *joined)[0])


def test_always_kept_rows_among_sampled_ones(make_source: MakeSource) -> None:
    """A row without inclusion is always kept; it does not make the others so."""
    rows = [make_source([1], inclusion=True, seed=3).rows[0][0], make_source([1]).rows[0][0]]
    batch = collate(rows, temperature=1.0)
    assert batch.inclusion_NK is not None
    assert (batch.inclusion_NK[batch.sample_index_N == 1] == 1).all()
    assert (batch.inclusion_NK[batch.sample_index_N == 0] < 1).any()


@pytest.mark.parametrize("module", ["settings", "source", "order.packing", "order.plan"])
def test_planning_imports_no_torch(module: str) -> None:
    """Settings are read for `--help`; torch takes seconds to import."""
    code = f"import pipeline.data.{module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_scores_are_of_the_entropy_at_temperature_1(make_source: MakeSource) -> None:
    rows = make_source([5], seed=4).rows[0]
    batch = collate(rows, temperature=2.0, score=lambda entropy_N, label_N: entropy_N - label_N)
    wanted_N = np.concatenate(
        [row.targets.entropy_NG[:, 0] - row.targets.label_logprob_N for row in rows]
    )
    assert batch.score_N is not None
    assert batch.score_N.tolist() == wanted_N.tolist()


def test_written_log_probs_are_those_of_all_rows_or_none(make_source: MakeSource) -> None:
    rows = [
        replace(
            row, targets=replace(row.targets, written_logprob_N=row.targets.label_logprob_N - 1)
        )
        for row in make_source([6], seed=5).rows[0]
    ]
    batch = collate(rows, temperature=1.0)
    assert batch.written_logprob_N is not None
    torch.testing.assert_close(batch.written_logprob_N, batch.label_logprob_N - 1)
    rows[2] = replace(rows[2], targets=replace(rows[2].targets, written_logprob_N=None))
    assert collate(rows, temperature=1.0).written_logprob_N is None
