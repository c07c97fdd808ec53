"""Tensor-parallel ranks share the rows of the logits: two real processes, the bits of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.teacher.engines.row_split import RowSplit, row_share
from tests.ranks import free_port

ROOT = Path(__file__).resolve().parents[3]

RANK = """
import sys
import numpy as np, torch, torch.distributed as dist
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.noise import row_noise
from pipeline.sampling.quantisation import SAMPLED_QUANTISATION
from pipeline.teacher.engines.row_split import RowSplit
from pipeline.teacher.sparsify.device import SparseScheme, sparsify

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

def gather(columns_SC):
    parts = [torch.empty_like(columns_SC) for _ in range(2)]
    dist.all_gather(parts, columns_SC)
    return torch.cat(parts)

split = RowSplit(rank, 2, gather)
grid = (1.0, 2.0)
schemes = (
    SparseScheme(9, grid),
    SparseScheme(0, grid, InclusionRule(grid, (1 / 9, 1 / 23.5)), SAMPLED_QUANTISATION),
)
for scheme in schemes:
    for rows in (1, 2, 7, 12):
        draw = torch.Generator().manual_seed(rows)
        logits_RV = torch.randn(rows, 3001, generator=draw) * 4
        label_R = torch.randint(3001, (rows,), generator=draw)
        noise_R = torch.from_numpy(row_noise(5, np.arange(rows)))
        taken = []
        def reduce(some):
            taken.append(len(logits_RV[some]))
            return sparsify(logits_RV[some], label_R[some], scheme, noise_R[some])
        found_RC = split.reduce(reduce, rows)
        alone_RC = sparsify(logits_RV, label_R, scheme, noise_R)
        assert torch.equal(found_RC, alone_RC), rows
        assert taken == [(rows + 1) // 2 if rank == 0 else rows // 2], (rank, rows, taken)
dist.destroy_process_group()
print("the same bits")
"""


def test_two_processes_reduce_half_of_the_rows_each_and_both_have_all() -> None:
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), port], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        ends = [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [out.strip() for out, _ in ends] == ["the same bits"] * 2, ends


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 1024])
def test_shares_are_all_rows_once_and_none_is_larger_than_the_first(rows: int, size: int) -> None:
    shares = [range(rows)[row_share(rows, rank, size)] for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) == len(shares[0])


def test_one_rank_gathers_nothing() -> None:
    def gather(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("one rank has nobody to gather from")

    rows_RC = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(RowSplit(0, 1, gather).reduce(lambda some: rows_RC[some], 3), rows_RC)
    assert torch.equal(RowSplit().reduce(lambda some: rows_RC[some], 3), rows_RC)
