"""The average of the weights: its arithmetic, its file, and what is exported in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import ResumeError
from pipeline.student.engine.average import WeightAverage


def _average(weight: torch.Tensor, name: str = "w", decay: float = 0.9) -> WeightAverage:
    return WeightAverage([(name, weight)], decay=decay, rank=0, world_size=1)


def test_each_step_takes_in_a_tenth() -> None:
    weight = torch.zeros(3)
    average = _average(weight)
    wanted = 0.0
    for value in (1.0, -2.0, 5.0):
        weight.fill_(value)
        average.update()
        wanted = 0.9 * wanted + 0.1 * value
    average.to_weights()
    torch.testing.assert_close(weight, torch.full((3,), wanted))


def test_small_steps_of_16_bit_weights_are_not_lost() -> None:
    """0.001 of a difference of 1/128 is far below what bfloat16 keeps beside 1."""
    weight = torch.ones(1, dtype=torch.bfloat16)
    average = _average(weight, decay=0.999)
    weight.fill_(1 + 2**-7)
    for _ in range(4000):
        average.update()
    average.to_weights()
    assert weight.item() == 1 + 2**-7


def test_a_file_gives_back_what_was_saved_and_lacks_nothing(tmp_path: Path) -> None:
    weight = torch.zeros(2)
    average = _average(weight)
    weight.fill_(10.0)
    average.update()
    average.save(tmp_path)
    again = torch.zeros(2)
    loaded = _average(again)
    loaded.load(tmp_path)
    loaded.to_weights()
    torch.testing.assert_close(again, torch.ones(2))
    with pytest.raises(ResumeError, match="no average of other"):
        _average(torch.zeros(2), "other").load(tmp_path)
