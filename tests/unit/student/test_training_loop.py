"""One step of the loop: dropout's numbers are those of the seed, the step and the rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.data.collate import collate
from pipeline.data.stream.train_stream import StepBatch
from pipeline.loss.settings import LossSettings
from pipeline.loss.targets import LossTerms
from pipeline.student.train_settings import TrainSettings
from pipeline.student.training.distributed import Distributed
from pipeline.student.training.loop import LoopSettings, TrainLoop


class _Engine:
    """Draws as dropout would, and returns terms of no tokens."""

    device = "cpu"
    learning_rate = 1e-3

    def __init__(self, rank: int) -> None:
        self.distributed = Distributed(rank=rank, local_rank=rank, world_size=2)
        self.sampled: list[torch.Tensor] = []

    def train_step(self, micro_batches: list[Any]) -> list[Any]:
        self.sampled.append(torch.rand(8))
        none = torch.zeros(0)
        return [(none.sum(), LossTerms(none.sum(), none, none)) for _ in micro_batches]

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return values

    def grad_norm(self) -> None:
        return None


class _Stream:
    steps_per_epoch = 4


def _sampled(*steps: int, rank: int = 0, seed: int = 7) -> list[torch.Tensor]:
    engine: Any = _Engine(rank)
    nothing: Any = None
    stream: Any = _Stream()
    settings = LoopSettings(
        train=TrainSettings(), loss=LossSettings(), divergence="kl", seed=seed, total_steps=9,
        output_dir=Path("unused"),
    )  # fmt: skip
    loop = TrainLoop(
        settings, engine=engine, stream=stream, evaluation=nothing, sinks=nothing,
        checkpoints=nothing,
    )  # fmt: skip
    for step in steps:
        batch = StepBatch(step, 0, [collate([], temperature=1.0)], 0, 0)
        values, stop = loop._step(batch)
        assert {"train/loss", "train/kl", "train/cross_entropy"} <= set(values)
        assert not stop
    return engine.sampled


def test_each_step_has_a_mask_of_its_own_and_a_resumed_run_the_same() -> None:
    first, second, third = _sampled(0, 1, 2)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    (resumed,) = _sampled(2)
    assert torch.equal(resumed, third)


def test_ranks_and_seeds_differ() -> None:
    ((ours,), (theirs,), (other,)) = (_sampled(3), _sampled(3, rank=1), _sampled(3, seed=8))
    assert not torch.equal(ours, theirs)
    assert not torch.equal(ours, other)
