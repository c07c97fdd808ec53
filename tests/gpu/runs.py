"""Whole runs of stage two as a user starts them: resumed, asked to stop, on several devices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.gpu.check import Figure, Place, at_least, at_most
from tests.tiny import make_teacher, make_tokenizer, write_corpus

__all__ = ["Runs", "a_dead_peer", "loss_gap", "resumed", "two_processes"]

STEPS = 24


class Runs:
    """A tiny cache that all checks share, and students trained from it in folders of their own."""

    def __init__(self, place: Place) -> None:
        """Make the cache, or find the one that an earlier check made."""
        self.root = place.scratch / "runs"
        corpus = write_corpus(self.root / "corpus")
        teacher = self.root / "teacher"
        if not teacher.exists():
            make_teacher(teacher, make_tokenizer(corpus))
        self._stage(
            "cache-teacher", "--teacher_model", teacher, "--teacher.engine", "transformers",
            "--dataset_name", corpus, "--max_length", 96, "--corpus.heldout_fraction", 0.25,
            "--capture.top_k", 16, "--capture.shard_tokens", 500, "--cache_dir",
            self.root / "cache",
        )  # fmt: skip
        self.flags = [
            "--student_model", teacher, "--student.keep_layers", "0,3", "--max_steps", STEPS,
            "--per_device_train_batch_size", 2, "--learning_rate", 3e-3, "--save_steps", 1000,
            "--temperature", 1, "--alpha", 1, "--cache_dir", self.root / "cache",
            "--train.evaluate_before", "false", "--gradient_accumulation_steps", 2,
            *(["--bf16"] if place.on_gpu else []),
        ]  # fmt: skip

    def _stage(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "stages", *map(str, arguments)]
        done = subprocess.run(command, check=False)
        assert done.returncode == 0, f"{arguments[0]} ended with code {done.returncode}"

    def start(self, name: str, *flags: object, processes: int = 1) -> subprocess.Popen[bytes]:
        """Start a training; its folder is `root / name`."""
        command = ["train-student", "--nproc", processes, *self.flags, *flags]
        command += ["--output_dir", self.root / name]
        return subprocess.Popen(
            [sys.executable, "-m", "stages", *map(str, command)], start_new_session=True
        )

    def train(self, name: str, *flags: object, processes: int = 1) -> dict[int, float]:
        """Train to the end; return the losses by step."""
        code = self.start(name, *flags, processes=processes).wait()
        assert code == 0, f"the run {name} ended with code {code}"
        return self.losses(name)

    def losses(self, name: str) -> dict[int, float]:
        """Return the losses logged so far, by step."""
        file = self.root / name / "metrics.jsonl"
        records = map(json.loads, file.read_text().splitlines() if file.exists() else ())
        return {
            int(record["step"]): float(record["train/loss"])
            for record in records
            if "train/loss" in record
        }


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not ready():
        assert process.poll() is None, f"the run ended with code {process.returncode}"
        time.sleep(0.05)


def loss_gap(one: dict[int, float], other: dict[int, float]) -> float:
    assert sorted(one) == sorted(other) == list(range(1, STEPS + 1))
    return max(abs(one[step] - other[step]) / abs(one[step]) for step in one)


def resumed(place: Place) -> list[Figure]:
    """Stop a run by SIGTERM in the middle, go on, and compare with one that nobody stopped."""
    runs = Runs(place)
    whole = runs.train("whole")
    process = runs.start("stopped")
    _wait_until(lambda: len(runs.losses("stopped")) >= 3, process)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    code = process.wait()
    seconds = time.monotonic() - started
    assert code != 0, "a run that was asked to stop ended with success"
    assert max(runs.losses("stopped")) < STEPS, "the run was over before it was asked to stop"
    complete = list((runs.root / "stopped/checkpoints").glob("*/complete.json"))
    gap = loss_gap(whole, runs.train("stopped"))
    return [
        at_least("checkpoints_after_sigterm", len(complete), 1),
        # On a CPU the very same losses; a GPU's kernels may add up in another order.
        at_most("loss_gap_after_resume", gap, 1e-3 if place.on_gpu else 0),
        at_most("seconds_to_stop", seconds, 60),
    ]


def two_processes(place: Place) -> list[Figure]:
    """Train with two processes and with one, the same packs in a step."""
    runs = Runs(place)
    one = runs.train("whole")
    two = runs.train("two", "--gradient_accumulation_steps", 1, processes=2)
    return [
        at_most("loss_gap_of_two_processes", loss_gap(one, two), 5e-3 if place.on_gpu else 1e-4)
    ]


def a_dead_peer(place: Place) -> list[Figure]:
    """Kill one of two processes; the run must end in good time, and not with success."""
    runs = Runs(place)
    process = runs.start("killed", "--train.timeout_s", 60, "--max_steps", 100_000, processes=2)
    _wait_until(lambda: len(runs.losses("killed")) >= 3, process)
    os.kill(_workers(process.pid)[-1], signal.SIGKILL)
    started = time.monotonic()
    code = process.wait(120)
    assert code != 0, "a run that lost a process ended with success"
    return [at_most("seconds_to_notice", time.monotonic() - started, 90)]


def _workers(launcher: int) -> list[int]:
    """Return the training processes below a launcher: those that have no child that trains."""
    parents = {int(folder.name): _parent(folder) for folder in Path("/proc").glob("[0-9]*")}
    level = [launcher]
    while below := [child for child, parent in parents.items() if parent in level]:
        training = [child for child in below if _trains(child)]
        if not training:
            break
        level = training
    return sorted(level)


def _parent(folder: Path) -> int | None:
    try:
        return int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def _trains(process: int) -> bool:
    try:
        return b"train_student" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
