"""`distil COMMAND`: the commands, their purposes, near names, and the processes of a training."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from stages import __main__ as console
from tests.stage_runner import ROOT


def test_every_command_is_a_module_with_a_main() -> None:
    for name, module in console.COMMANDS.items():
        spec = importlib.util.find_spec(module)
        assert spec is not None, name
        assert spec.origin is not None
        assert "def main(" in Path(spec.origin).read_text(encoding="utf-8"), name


def test_the_overview_names_each_command_with_its_purpose(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert console.main([]) == 0
    out = capsys.readouterr().out
    for name in console.COMMANDS:
        line = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert len(line.split()) > 3


def test_a_near_name() -> None:
    with pytest.raises(
        ConfigError, match=r"trian-student: unknown command.*did you mean train-student\?"
    ):
        console.main(["trian-student", "--check"])


def test_arguments_go_to_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        console.main(["cache_teacher", "--help"])
    assert end.value.code == 0
    assert "--teacher.model" in capsys.readouterr().out


@pytest.mark.parametrize("given", [["--nproc", "2"], ["--nproc=2"]])
def test_processes_are_checked_for_first(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> object:
        ran.append(command)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("subprocess.run", run)
    assert console.main(["train-student", "--cache_dir", "c", *given]) == 0
    checked, trained = ran
    assert checked[1:] == ["-m", "stages.train_student", "--cache_dir", "c", "--check"]
    assert trained[-5:] == ["570", "-m", "stages.train_student", "--cache_dir", "c"]
    assert trained[trained.index("--nproc-per-node") + 1] == "2"
    assert "torch.distributed.run" in trained


@pytest.mark.parametrize("given", [["--nproc"], ["--nproc", "two"], ["--nproc=0"]])
def test_a_number_of_processes_that_is_none(given: list[str]) -> None:
    with pytest.raises(ConfigError, match="--nproc: found"):
        console.main(["train-student", *given])


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_waiting_threads_do_not_spin_unless_asked_to(own: str | None) -> None:
    """Set before torch is loaded, in every stage: `stages` is imported first."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {} if own is None else {"OMP_WAIT_POLICY": own}
    code = "import os, sys, stages; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [own or "PASSIVE", "False"]
