"""Where a run resumes: a checkpoint of another number of ranks is resharded, or rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ResumeError
from pipeline.student.settings.train import TrainSettings
from pipeline.student.training.checkpoint import Checkpoints, RunIdentity
from pipeline.student.training.distributed import Distributed
from pipeline.student.training.resume import ResumePoint, find_resume_point


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """One checkpoint at step 6, written by two ranks under ZeRO."""
    found = Checkpoints(tmp_path, RunIdentity({"seed": 1}), keep=2)
    folder = found.folder(6)
    folder.mkdir(parents=True)
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"state")
    found.mark_complete(6, world_size=2)
    return found


def _found(checkpoints: Checkpoints, world_size: int, **train: Any) -> ResumePoint | None:
    distributed = Distributed(rank=0, local_rank=0, world_size=world_size)
    return find_resume_point(checkpoints, TrainSettings(**train), distributed)


def test_the_same_number_of_ranks(checkpoints: Checkpoints) -> None:
    for optim in ("adamw_torch", "sgd"):
        point = _found(checkpoints, 2, optim=optim)
        assert point is not None
        assert (point.checkpoint.step, point.reshard) == (6, False)


def test_another_number_is_resharded(checkpoints: Checkpoints) -> None:
    point = _found(checkpoints, 3, optim="adamw_torch")
    assert point is not None
    assert point.reshard


@pytest.mark.parametrize("optim", ["sgd", "rmsprop"])
def test_a_state_that_cannot_be_resharded_is_rejected(checkpoints: Checkpoints, optim: str) -> None:
    with pytest.raises(ResumeError) as caught:
        _found(checkpoints, 1, optim=optim)
    message = str(caught.value)
    assert "written by 2 processes, this run has 1" in message
    assert f"the state of {optim} under ZeRO cannot be resharded" in message
    assert "start with NPROC=2" in message


def test_without_zero_any_number_goes(checkpoints: Checkpoints) -> None:
    for file in checkpoints.folder(6).glob("*_optim_states.pt"):
        file.unlink()
    point = _found(checkpoints, 1, optim="sgd", zero_stage=0)
    assert point is not None
    assert not point.reshard


def test_never_deletes_what_is_there(checkpoints: Checkpoints) -> None:
    assert _found(checkpoints, 2, resume_from_checkpoint="never") is None
    assert checkpoints.newest() is None
