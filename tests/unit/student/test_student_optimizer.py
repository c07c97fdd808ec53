"""Names of transformers, and what they do."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.student.settings.train import TrainSettings
from pipeline.student.training.optimizer import has_rank_free_form, make_optimizer, make_schedule

STEPS = 40


def _rates(**values: Any) -> list[float]:
    import torch

    settings = TrainSettings(learning_rate=1.0, **values)
    optimizer = make_optimizer(settings, [{"params": [torch.nn.Parameter(torch.zeros(2))]}])
    schedule = make_schedule(settings, optimizer, total_steps=STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return [*rates, schedule.get_last_lr()[0]]


@pytest.mark.parametrize(
    ("name", "half", "last"),
    [
        ("linear", 20 / 36, 0.0),
        ("cosine", 0.587, 0.0),
        ("cosine_with_restarts", 0.587, 0.0),
        ("cosine_with_min_lr", 0.1 + 0.9 * 0.587, 0.1),
        ("polynomial", 20 / 36, 0.0),
        ("constant", 1.0, 1.0),
        ("constant_with_warmup", 1.0, 1.0),
        ("inverse_sqrt", None, None),
        ("warmup_stable_decay", 1.0, 0.1),
    ],
)
def test_every_schedule_runs_and_ends_where_it_says(
    name: str, half: float | None, last: float | None
) -> None:
    rates = _rates(lr_scheduler_type=name, warmup_ratio=0.1)
    assert max(rates) == pytest.approx(1.0, abs=0.02)
    if name != "constant":
        assert rates[0] < 0.2, "warm-up"
    if half is not None:
        assert rates[20] == pytest.approx(half, abs=0.01)
        assert rates[-1] == pytest.approx(last, abs=1e-6)
    else:
        assert rates[4] > rates[20] > rates[-1] > 0


def test_the_share_of_decay() -> None:
    rates = _rates(lr_scheduler_type="warmup_stable_decay", lr_decay_ratio=0.5, warmup_ratio=0)
    assert rates[:20] == [1.0] * 20
    assert rates[21] < 1
    whole = _rates(lr_scheduler_type="warmup_stable_decay", lr_decay_ratio=1, warmup_ratio=0.5)
    assert whole[20] == 1, "no decay before the warm-up has ended"


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch", "sgd", "rmsprop"])
def test_every_optimiser_is_transformers_own(name: str) -> None:
    """One step of ours, one of the class and arguments that transformers' Trainer would take."""
    import torch
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir="unused", optim=name, learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.9,
        use_cpu=True,
    )  # fmt: skip
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    ours, theirs = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(2))
    settings = TrainSettings(optim=name, learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.9)
    optimizers = (
        make_optimizer(settings, [{"params": [ours], "weight_decay": 0.3}]),
        kind([{"params": [theirs], "weight_decay": 0.3}], **options),
    )
    for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
        for scale in (1.0, 0.5):
            parameter.grad = torch.tensor([1.0, -2.0, 0.0, 3.0]) * scale
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_which_can_change_ranks() -> None:
    assert has_rank_free_form(TrainSettings())
    assert not has_rank_free_form(TrainSettings(optim="sgd"))
