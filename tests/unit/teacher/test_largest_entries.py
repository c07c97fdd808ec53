"""The k largest entries by groups: torch.topk's values and ids, whatever is equal."""

from __future__ import annotations

import pytest
import torch

from pipeline.teacher.sparsify.largest import largest_entries


@pytest.mark.parametrize("vocab", [50, 700, 4096, 9973])
@pytest.mark.parametrize("k", [1, 5, 33])
@pytest.mark.parametrize("levels", [None, 4000, 300, 3, 1])
def test_they_are_torchs(vocab: int, k: int, levels: int | None) -> None:
    draw = torch.Generator().manual_seed(vocab + k)
    z_RV = torch.randn(9, vocab, generator=draw) * 4
    if levels is not None:  # many equal logits, as of a 16-bit head
        z_RV = torch.randint(levels, (9, vocab), generator=draw).float()
    values_Rk, ids_Rk = largest_entries(z_RV, k)
    there = torch.topk(z_RV, k, dim=-1)
    assert torch.equal(values_Rk, there.values)
    assert torch.equal(z_RV.gather(1, ids_Rk), values_Rk)
    assert torch.equal(ids_Rk.sort(-1).values, there.indices.sort(-1).values)
    if levels is None:
        assert torch.equal(ids_Rk, there.indices)


def test_the_largest_may_stand_together_or_behind_the_groups() -> None:
    for start in (0, 5000, 9900):
        z_RV = torch.zeros(2, 9973) + torch.arange(9973) / 1e6
        z_RV[:, start : start + 40] += 5
        assert torch.equal(largest_entries(z_RV, 40)[1], torch.topk(z_RV, 40).indices)


def test_torch_is_asked_for_rows_whose_end_is_ambiguous_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    topk = torch.topk

    def counting(z: torch.Tensor, *args: int, **options: int) -> object:
        asked.append(tuple(z.shape))
        return topk(z, *args, **options)

    monkeypatch.setattr(torch, "topk", counting)
    z_RV = torch.randn(4, 9973, generator=torch.Generator().manual_seed(0))
    largest_entries(z_RV, 8)
    assert asked == []
    z_RV[2] = 0.0
    largest_entries(z_RV, 8)
    assert asked == [(1, 9973)]


def test_a_row_of_nan_changes_no_other() -> None:
    z_RV = torch.randn(3, 4096, generator=torch.Generator().manual_seed(0))
    clean = largest_entries(z_RV, 20)
    z_RV[1] = float("nan")
    found = largest_entries(z_RV, 20)
    for row in (0, 2):
        assert torch.equal(found[0][row], clean[0][row])
        assert torch.equal(found[1][row], clean[1][row])
    assert ((found[1] >= 0) & (found[1] < 4096)).all()
