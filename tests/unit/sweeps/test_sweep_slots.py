"""Places of a sweep: GPUs are not shared, CPU threads are divided, a user's choice is kept."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from pipeline.sweeps.slots import make_slots


def test_each_run_gets_its_own_gpus() -> None:
    slots = make_slots(2, nproc=2, gpus=("0", "1", "2", "5"), cpus=8, environment={})
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0,1", "2,5"]


def test_too_few_gpus() -> None:
    with pytest.raises(ConfigError) as caught:
        make_slots(3, nproc=1, gpus=("0", "1"), cpus=8, environment={})
    assert "--parallel 3 with --nproc 1: 3 processes; expected at most the 2 GPUs" in str(
        caught.value
    )


def test_cpu_threads_are_divided() -> None:
    slots = make_slots(2, nproc=1, gpus=(), cpus=7, environment={})
    assert [slot.environment for slot in slots] == [{"OMP_NUM_THREADS": "3"}] * 2
    assert make_slots(8, nproc=2, gpus=(), cpus=4, environment={})[0].environment == {
        "OMP_NUM_THREADS": "1"
    }


def test_alone_and_by_the_users_choice_nothing_is_set() -> None:
    assert make_slots(1, nproc=1, gpus=(), cpus=8, environment={})[0].environment == {}
    chosen = {"OMP_NUM_THREADS": "5"}
    assert make_slots(2, nproc=1, gpus=(), cpus=8, environment=chosen)[0].environment == {}
