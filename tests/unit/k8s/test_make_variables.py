"""What the make targets call, and that what they are given is text, whatever it holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stage_runner import ROOT

_PRINTER = """#!{python}
import json, sys
print("ARGV", json.dumps(sys.argv[1:]))
"""


def _make(tmp_path: Path, *arguments: str, **environment: str) -> list[str]:
    """Return the words that a target's program gets."""
    printer = tmp_path / "printer"
    printer.write_text(_PRINTER.format(python=sys.executable))
    printer.chmod(0o755)
    programs = [f"STUDENT={printer}", f"TEACHER={printer}", "SETUP=@true"]
    # Of an outer make, and of whoever runs the tests.
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        ["make", "--no-print-directory", *programs, *arguments], cwd=ROOT,
        env={**clean, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ARGV ")]
    words: list[str] = json.loads(line.removeprefix("ARGV "))
    return words


def test_the_targets_are_those_of_one_machine(tmp_path: Path) -> None:
    assert _make(tmp_path, "cache-teacher", "ARGS=--seed 1") == [
        "-m", "stages.cache_teacher", "--seed", "1",
    ]  # fmt: skip
    cluster = _make(
        tmp_path, "train-student", "OVERLAY=hyperpod", "RUN=runs/exp1", "NODES=2", "DRY_RUN=1",
        "INSTANCE=p5en", "ARGS=--seed 1 --name 'two words'",
    )  # fmt: skip
    assert cluster == [
        "-m", "k8s", "train-student", "--overlay", "hyperpod", "--instance", "p5en", "--dry-run",
        "--run", "exp1", "--nodes", "2", "--", "--seed", "1", "--name", "two words",
    ]  # fmt: skip
    assert _make(tmp_path, "cache-teacher", "OVERLAY=local-kind")[5:7] == ["--run", "default"]


def test_the_preparation_has_workers_and_no_nodes(tmp_path: Path) -> None:
    assert _make(tmp_path, "prepare-corpus", "ARGS=--seed 1")[1] == "stages.prepare_corpus"
    cluster = _make(
        tmp_path, "prepare-corpus", "OVERLAY=o", "WORKERS=4", "NODE_SELECTOR=pool=cpu", "NODES=3"
    )
    assert cluster[-5:] == ["--workers", "4", "--node_selector", "pool=cpu", "--"]
    # A variable of the environment that is called WORKERS is not the other targets'.
    assert "--workers" not in _make(tmp_path, "cache-teacher", "OVERLAY=o", WORKERS="4")


HOSTILE = [
    "$(touch {mark})", "`touch {mark}`", "; touch {mark}", '"; touch {mark}; "',
    "' ; touch {mark} '", "$(shell touch {mark})", "$$(touch {mark})", "a\ntouch {mark}",
    "${{IFS}}",
    "x && touch {mark}", "$(eval X:=$(shell touch {mark}))", "-- --config /etc/passwd", "a #b",
]  # fmt: skip
PLACES = {
    "RUN": ("train-student", "--run"),
    "OVERLAY": ("train-student", "--overlay"),
    "CONFIG": ("train-student", "--config"),
    "IMAGE": ("fsx-init", "--image"),
    "REGION": ("fsx-volume", "--region"),
    "SWEEP": ("sweep", "--sweep"),
    "STAGE": ("logs", "--stage"),
    "NODE_SELECTOR": ("prepare-corpus", "--node_selector"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_hostile_value_is_text(tmp_path: Path, name: str) -> None:
    """CI may pass the name of a branch, which anybody chooses."""
    target, flag = PLACES[name]
    mark = tmp_path / "mark"
    given = HOSTILE if name == "RUN" else (HOSTILE[3], HOSTILE[5])
    for text in given:
        value = text.format(mark=mark)
        wanted = value.rsplit("/", 1)[-1] if name == "RUN" else value
        overlay = [] if name == "OVERLAY" else ["OVERLAY=o"]
        words = _make(tmp_path, target, *overlay, f"{name}={value}")
        assert words[words.index(flag) + 1] == wanted
        assert not mark.exists(), value
    words = _make(tmp_path, target, *overlay, **{name: HOSTILE[5].format(mark=mark)})
    assert not mark.exists(), "from the environment"
    assert words[words.index(flag) + 1].startswith(("$(shell", "mark)"))


@pytest.mark.parametrize("name", ["RUN", "NPROC", "CONFIG"])
def test_a_hostile_value_is_text_on_one_machine(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    target = "report" if name == "RUN" else "train-student"
    for text in (HOSTILE[1], HOSTILE[3], HOSTILE[5]):
        assert text.format(mark=mark) in _make(tmp_path, target, f"{name}={text.format(mark=mark)}")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["TAG", "REGION", "ACCOUNT"])
def test_a_hostile_value_reaches_no_shell_when_pushing(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    for text in (HOSTILE[1], HOSTILE[3], HOSTILE[5]):
        subprocess.run(
            ["make", "--no-print-directory", "push-images", f"{name}={text.format(mark=mark)}"],
            cwd=ROOT, env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=False,
        )  # fmt: skip
    assert not mark.exists()
