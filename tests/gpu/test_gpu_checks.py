"""The command `make check-gpu` itself, on whatever machine the tests run on."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

import pytest

from tests.gpu.__main__ import ask
from tests.gpu.check import Check, Figure, Machine, Outcome, Place, at_least, at_most, run_check
from tests.gpu.checks import CHECKS
from tests.gpu.table import markdown_table, terminal_lines
from tests.stage_runner import run_python

CPU = Machine("CPU", 0, "2026-11-30", {"torch": "2.13.0"})


def holds(_place: Place) -> list[Figure]:
    return [at_most("small", 1, 2), at_least("large", 3, 2), Figure("told", 7)]


def breaks_a_limit(_place: Place) -> list[Figure]:
    return [at_most("small", 3, 2), at_least("large", 3, 2)]


def gives_no_number(_place: Place) -> list[Figure]:
    return [at_most("small", float("nan"), 2)]


def raises(_place: Place) -> list[Figure]:
    raise RuntimeError("CUDA error: device-side assert triggered")


def _check(name: str, **options: float) -> Check:
    return Check(name, "does it", f"tests.gpu.test_gpu_checks:{name}", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "state", "message"),
    [
        ("holds", "passed", ""),
        ("breaks_a_limit", "failed", "small 3 (at most 2)"),
        ("gives_no_number", "failed", "small nan (at most 2)"),
        ("raises", "failed", "RuntimeError: CUDA error: device-side assert triggered"),
    ],
)
def test_what_a_check_says(name: str, state: str, message: str, tmp_path: Path) -> None:
    found, figures, said = run_check(_check(name), Place("cpu", tmp_path))
    assert (found, said) == (state, message)
    outcome = Outcome(name, "does it", found, 1.5, tuple(figures), said)
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome or said != ""
    lines = terminal_lines(outcome)
    assert lines[0].startswith(state)
    assert name in lines[0]
    assert all(str(figure) in "\n".join(lines) for figure in figures)


def test_the_table_of_a_document() -> None:
    outcomes = [
        Outcome("a", "does it", "passed", 1.0, (at_most("small", 1, 2),)),
        Outcome("b", "does that", "not run", 0.0, message="needs a GPU"),
    ]
    table = markdown_table(CPU, outcomes).splitlines()
    assert table[0] == "CPU, 2026-11-30; torch 2.13.0"
    assert table[4:] == [
        "| a | does it | passed | small 1 (at most 2) |",
        "| b | does that | not run | needs a GPU |",
    ]


@pytest.mark.parametrize(
    ("gpus", "options", "needs"),
    [
        (0, {"gpus": 1}, "needs a GPU"),
        (1, {"gpus": 1, "processes": 2}, "needs 2 GPUs"),
        (1, {"processes": 2}, "needs 2 GPUs"),
    ],
)
def test_what_this_machine_cannot_tell(
    gpus: int, options: dict[str, float], needs: str, tmp_path: Path
) -> None:
    here = Machine("device", gpus, "2026-11-30")
    outcome = ask(_check("holds", **options), here, sys.executable, tmp_path)
    assert (outcome.state, outcome.message) == ("not run", needs)


def test_a_process_that_dies_or_hangs_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dies = ask(Check("nobody", "is it there", "none:none"), CPU, sys.executable, tmp_path)
    assert dies.state == "failed"
    assert dies.message.startswith("ended with code ")
    hangs = ask(
        Check("loss", "does it end", "none:none", limit_s=0.2), CPU, sys.executable, tmp_path
    )
    assert (hangs.state, hangs.message) == ("failed", "not done after 0.2 s")


def test_the_time_for_all_checks(tmp_path: Path) -> None:
    check = Check("loss", "does it end", "none:none", limit_s=50)
    over = ask(check, CPU, sys.executable, tmp_path, end=time.monotonic() - 1)
    assert (over.state, over.seconds) == ("failed", 0)
    assert over.message.startswith("not asked: the time for all checks is over")
    short = ask(check, CPU, sys.executable, tmp_path, end=time.monotonic() + 0.2)
    assert (short.state, short.message) == ("failed", "not done after 0.2 s")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_each_is_there(check: Check) -> None:
    module, name = check.function.split(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert not check.question.endswith("?")
    assert check.limit_s <= 400


def test_names_differ() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS) >= 15


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """The cheap checks of each kind; the others run whole training runs or vLLM."""
    out = tmp_path / "gpu-check.json"
    cheap = ["reduction", "loss", "loss-large", "families", "attention", "first-steps"]
    done = run_python(["-m", "tests.gpu", "--out", out, "--only", *cheap], timeout=400).ok()
    assert f"written to {out}" in done.out
    record = json.loads(out.read_text())
    states = {outcome["name"]: outcome["state"] for outcome in record["checks"]}
    assert sorted(states) == sorted(cheap)
    assert set(states.values()) <= {"passed", "not run"}
    assert record["machine"]["versions"]["torch"]
    table = run_python(["-m", "tests.gpu", "--table", out]).ok().out
    assert "| loss | are loss and gradient those of float64" in table
