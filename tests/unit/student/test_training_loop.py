"""The loop, with stand-ins for engine and stream: draws, readings of the device, ends, profiles."""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.collate import collate
from pipeline.data.stream.train_stream import StepBatch
from pipeline.errors import ConfigError, DistillError, Interrupted
from pipeline.loss.settings import LossSettings
from pipeline.loss.targets import LossTerms
from pipeline.student.sequence.groups import SequenceGroup
from pipeline.student.sequence.parallel import SequenceParallel
from pipeline.student.settings.profile_window import check_profile_window
from pipeline.student.settings.train import TrainSettings
from pipeline.student.training.distributed import Distributed
from pipeline.student.training.logged.speed import Peak
from pipeline.student.training.loop import LoopSettings, TrainLoop


class _Engine:
    """Draws as dropout would, and returns terms of one token; counts how often it is read."""

    device = "cpu"
    learning_rate = 1e-3
    skipped_updates = 2

    def __init__(self, rank: int = 0, *, bad: frozenset[int] = frozenset(), ranks: int = 2) -> None:
        self.distributed = Distributed(rank=rank, local_rank=rank, world_size=ranks)
        self.sampled: list[torch.Tensor] = []
        self.events: list[str] = []
        self._bad = bad

    def train_step(self, micro_batches: list[Any]) -> list[Any]:
        self.sampled.append(torch.rand(8))
        step = len(self.sampled)
        self.events.append(f"step {step}")
        one = torch.full((1,), torch.nan if step in self._bad else float(step))
        return [(one.sum(), LossTerms(one.sum(), one, 2 * one)) for _ in micro_batches]

    def sum_over_ranks(self, values: Any) -> list[float]:
        self.events.append("read")
        return [float(value) for value in values]

    def gather_objects(self, value: Any) -> list[Any]:
        return [-1, value]

    def any_rank(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        pass

    def use_average(self) -> None:
        pass

    def save(self, folder: Path, *, step: int) -> None:
        self.events.append(f"save {step}")

    def grad_norm(self) -> None:
        return None


class _Stream:
    steps_per_epoch = 4
    wait_seconds = 0.0

    def __init__(self, ask: int | None = None) -> None:
        self._ask = ask

    def is_ready(self) -> bool:
        return True

    def tokens_of(self, steps: int) -> int:
        return 100 * steps

    def cache_epochs(self, steps: int) -> dict[str, float]:
        return {}

    def steps(self, start: int, stop: int, *, agree: Any) -> Iterator[StepBatch]:
        for step in range(start, stop):
            if step + 1 == self._ask:
                os.kill(os.getpid(), signal.SIGTERM)
            yield StepBatch(step, 0, [collate([], temperature=1.0)], 1, 100)


class _Sinks(dict[int, dict[str, float]]):
    def log(self, step: int, values: dict[str, float]) -> None:
        self.setdefault(step, {}).update(values)


class _Checkpoints:
    def folder(self, step: int) -> Path:
        return Path(f"step-{step}")

    def mark_complete(self, step: int, *, world_size: int) -> None:
        pass


def _run(
    tmp_path: Path,
    engine: _Engine,
    *,
    steps: int = 7,
    stream: _Stream | None = None,
    peak: Peak | None = None,
    **train: Any,
) -> dict[int, dict[str, float]]:
    sinks, parts = _Sinks(), {"evaluate": "never", "evaluate_before": False, "save_steps": 100}
    settings = LoopSettings(
        train=TrainSettings.model_validate({**parts, **train}), loss=LossSettings(alpha=0.5),
        divergence="kl", seed=7, total_steps=steps, output_dir=tmp_path, peak=peak,
    )  # fmt: skip
    loop: Any = TrainLoop
    loop = loop(
        settings, engine=engine, stream=stream or _Stream(), evaluation=None, sinks=sinks,
        checkpoints=_Checkpoints(),
    )  # fmt: skip
    loop.run(0)
    return sinks


def test_the_device_is_read_at_logged_steps_only(tmp_path: Path) -> None:
    engine = _Engine()
    logged = _run(tmp_path, engine, logging_steps=3)
    assert sorted(logged) == [3, 6, 7]
    assert engine.events == [
        "step 1", "step 2", "step 3", "read", "step 4", "step 5", "step 6", "read",
        "step 7", "read", "save 7",
    ]  # fmt: skip
    # Losses are those of the logged step itself: D = step, CE = 2 step, T = 1.
    temperature = LossSettings().temperature
    assert logged[6]["train/kl"] == 6.0
    assert logged[6]["train/loss"] == 0.5 * temperature**2 * 6.0 + 0.5 * 12.0
    assert logged[6]["train/total_tokens"] == 600.0
    assert logged[6]["train/skipped_updates"] == 2.0


def test_a_loss_that_is_not_finite_is_named_by_its_first_step(tmp_path: Path) -> None:
    """Also between logged steps; nothing is saved after it."""
    engine = _Engine(bad=frozenset({2, 5}))
    with pytest.raises(DistillError, match="not finite at step 2"):
        _run(tmp_path, engine, logging_steps=6, save_steps=4)
    assert engine.events == ["step 1", "step 2", "step 3", "step 4", "read"]


def test_the_last_step_is_checked_too(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="not finite at step 7"):
        _run(tmp_path, _Engine(bad=frozenset({7})), logging_steps=100)


def test_sigterm_ends_the_run_with_the_step_in_which_it_comes(tmp_path: Path) -> None:
    engine = _Engine()
    with pytest.raises(Interrupted, match="after step 3 of 7"):
        _run(tmp_path, engine, stream=_Stream(ask=3), logging_steps=100)
    assert engine.events[-2:] == ["read", "save 3"]


def test_all_ranks_stop_where_one_was_asked_to(tmp_path: Path) -> None:
    class Asked(_Engine):
        def any_rank(self, flag: bool) -> bool:
            assert not flag, "this one was not"
            return len(self.sampled) == 3

    engine = Asked()
    with pytest.raises(Interrupted, match="after step 3 of 7"):
        _run(tmp_path, engine)
    assert engine.events[-1] == "save 3"


def test_speed_is_of_all_steps_since_the_last_logged_one(tmp_path: Path) -> None:
    peak = Peak(flops_per_s=1e3, flops_of=lambda batch: 5.0)
    logged = _run(tmp_path, _Engine(), logging_steps=3, peak=peak)
    for step, count in ((3, 3), (6, 3), (7, 1)):
        values = logged[step]
        rate = values["throughput/tokens_per_s"]
        assert values["throughput/tokens_per_s_per_device"] == rate / 2
        seconds = 100 * count / rate
        assert values["throughput/mfu"] == pytest.approx(5 * count / seconds / 1e3)
    assert "throughput/mfu" not in _run(tmp_path, _Engine())[1]


def test_a_window_of_steps_is_profiled(tmp_path: Path) -> None:
    _run(tmp_path, _Engine(), profile_steps="2:3")
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps-2-3.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::rand" for event in events) == 2


def test_a_run_that_ends_in_the_window_keeps_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        _run(tmp_path, _Engine(), stream=_Stream(ask=4), profile_steps="3:6")
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["steps-3-4.json.gz"]
    _run(tmp_path / "second", _Engine(rank=1), profile_steps="3:6")
    assert not (tmp_path / "second" / "profile").exists(), "the first rank's alone"


@pytest.mark.parametrize("text", ["5", "0:3", "4:2", "a:b", "-1:2", "1:2:3", ""])
def test_a_bad_window_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match="expected the first and the last step, from 1"):
        TrainSettings(profile_steps=text)


def test_a_window_past_the_end_is_refused() -> None:
    check_profile_window("10:12", total_steps=12)
    with pytest.raises(ConfigError, match="profile_steps is 10:12, but the run has 11 steps"):
        check_profile_window("10:12", total_steps=11)


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
        checkpoints=nothing, sequence=SequenceParallel(SequenceGroup.of(0, size=1, data_size=1)),
    )  # fmt: skip
    for step in steps:
        batch = StepBatch(step, 0, [collate([], temperature=1.0)], 0, 0)
        assert not loop._step(batch)
        assert {"train/loss", "train/kl", "train/cross_entropy"} <= set(loop._read(batch))
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
