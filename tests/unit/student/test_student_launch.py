"""What a launcher is told, and what a process takes of the cores."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from pipeline.student.engine.launch import (
    prepare_environment,
    threads_of_a_process,
    torchrun_arguments,
    warn_of_short_grace,
)


def test_the_launcher_waits_for_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert torchrun_arguments(4)[-4:] == ["--nproc-per-node", "4", "--shutdown-timeout", "570"]
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "20")
    assert torchrun_arguments(4)[-1] == "20"


def test_a_short_grace_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    with caplog.at_level(logging.WARNING):
        warn_of_short_grace()  # no launcher
        assert not caplog.records
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        warn_of_short_grace()
        assert "--shutdown-timeout 570" in caplog.text
        caplog.clear()
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "570")
        warn_of_short_grace()
        assert not caplog.records


@pytest.mark.parametrize(
    ("processes", "own", "usable", "of_launcher", "threads"),
    [
        (8, 192, 192, 192, 24),
        (8, 96, 96, 192, 24),  # bound to the cores beside its GPU
        (8, 4, 4, 192, 4),
        (8, 192, 176, 192, 22),  # a container's quota
        (2, 2, 2, 2, 1),
        (8, 4, 4, 4, 1),
    ],
)
def test_threads(processes: int, own: int, usable: int, of_launcher: int, threads: int) -> None:
    found = threads_of_a_process(processes, own=own, usable=usable, of_launcher=of_launcher)
    assert found == threads


@pytest.mark.parametrize(("chosen", "said"), [({}, "2"), ({"OMP_NUM_THREADS": "1"}, "1")])
def test_threads_under_a_launcher(chosen: dict[str, str], said: str) -> None:
    """A launcher that sets one thread, and one whose caller has chosen it."""
    code = (
        "import os\n"
        "os.sched_getaffinity = lambda process: range(4)\n"
        "from pipeline.student.engine import launch\n"
        "launch.usable_cores = lambda: 4\n"
        "launch.use_cores()\n"
        "import torch; print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])\n"
    )
    launcher = (
        "import os, subprocess, sys\n"
        "os.environ.update(OMP_NUM_THREADS='1', LOCAL_WORLD_SIZE='2')\n"
        f"sys.exit(subprocess.run([sys.executable, '-c', {code!r}]).returncode)\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", launcher], env={**env, **chosen}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.split() == [said, said]


def test_the_allocator_is_left_as_it_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    prepare_environment()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    prepare_environment()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    prepare_environment()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
