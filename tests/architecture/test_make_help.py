"""`make help` lists every target once, under its group, in the order in which people need them."""

from __future__ import annotations

import os
import re
import subprocess

from tests.stage_runner import ROOT

GROUPS = ["Run", "Set up", "Check", "Cluster", "Measure"]
RUN = [
    "distill", "distill-long", "preview", "prepare-corpus", "cache-teacher", "train-student",
    "sweep", "rounds", "score-student", "eval-student", "push-student", "report",
]  # fmt: skip


def _help() -> str:
    outer = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_groups_in_order_and_every_target_once() -> None:
    listed: dict[str, list[str]] = {"": []}
    group = ""
    for line in _help().splitlines():
        if target := re.match(r"  ([a-z][a-z-]*)\s+\S", line):
            listed[group].append(target[1])
        elif line:
            group = line
            assert group not in listed
            listed[group] = []
    assert list(listed) == ["", *GROUPS]
    assert listed[""] == ["help"]
    assert listed["Run"] == RUN
    assert {name.startswith("bench-") for name in listed["Measure"]} == {True}
    names = [name for group in listed.values() for name in group]
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    # In the file's order, so that Makefile and help read the same.
    assert names == re.findall(r"^([a-z][a-z0-9-]*):(?!=)", text, re.MULTILINE)
