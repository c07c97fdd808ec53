"""Whose text a student should learn from: the corpus's, the teacher's or its own, at equal tokens.

All arms start from one student that has learned from the corpus's text (that of `make rounds`) and
train on as many tokens, in as many steps: one round on the corpus's text again, on responses that
the teacher wrote, on responses that the student itself wrote, and two rounds of half as many on
its own. Each is scored on the held-out text of the corpus, on that of the teacher, and on what it
writes itself to the held-out prompts. Every part is a command of the project and is kept below
`runs/bench/rounds`, so that a stopped bench can continue.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.evaluate.measures import HeldoutScores
from pipeline.student.engine.launch import prepare_environment
from stages.round_commands import RoundCommands, Weights
from stages.score_student import scores_of

FOLDER = Path("runs/bench/rounds")
CONFIGS = "stages/configs"
ARMS = ("corpus", "teacher", "own, 1 round", "own, 2 rounds")


@dataclass(frozen=True, slots=True)
class Arm:
    """One student's way from the first student to its scores."""

    name: str
    seed: int
    scores: dict[str, HeldoutScores]

    def mean(self, text: str) -> float:
        """Return the held-out KL in nats on one text."""
        return self.scores[text].mean("kl").value


class Bench:
    """The parts of all arms, each passed over where it is done."""

    def __init__(self, root: Path, steps: int) -> None:
        self._root = root
        self._steps = steps
        self._commands = RoundCommands(
            root,
            teacher_config=f"{CONFIGS}/rounds-teacher.yaml",
            first_config=f"{CONFIGS}/rounds-student.yaml",
            round_config=f"{CONFIGS}/rounds-again.yaml",
            start="corpus",
            seed=42,
            weights=Weights(corpus=0.0, earlier=0.0),
            teacher_python=sys.executable,
            nproc=1,
        )

    def first_student(self) -> str:
        """Make the corpus's cache and the student from which all arms start; return its folder."""
        (folder,) = self._commands.folders(0)
        for part in self._commands.before_rounds():
            if part.output in (self._commands.corpus, folder.student):
                self._do(part.title, part.output, part.command)
        return folder.model

    def arm(self, name: str, seed: int) -> Arm:
        """Train and score one arm."""
        model = self.first_student()
        folder = self._root / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        rounds = 2 if name.endswith("2 rounds") else 1
        for number in range(1, rounds + 1):
            cache = self._cache(name, folder, model, seed=seed, number=number)
            student = folder / f"student-{number}"
            self._do(
                f"{name}, seed {seed}: training {number}",
                student,
                [
                    sys.executable, "-m", "stages.train_student",
                    "--config", f"{CONFIGS}/rounds-again.yaml", "--cache_dir", str(cache),
                    "--student_model", model, "--output_dir", str(student), "--seed", str(seed),
                    "--max_steps", str(self._steps // rounds),
                ],
            )  # fmt: skip
            model = str(student / "model")
        return Arm(name, seed, self._scores(name, folder, model, seed))

    def _cache(self, name: str, folder: Path, model: str, *, seed: int, number: int) -> Path:
        """Return the cache that an arm's training reads; make it where it is missing."""
        if name == "corpus":
            return self._commands.corpus
        if name == "teacher":
            cache = self._root / f"teacher-text-{seed}"
            command = self._commands.writing(cache, None, seed=1000 * seed + 1)
        else:
            cache = folder / f"cache-{number}"
            command = self._commands.writing(cache, model, seed=1000 * seed + number)
        self._do(f"{name}, seed {seed}: text {number}", cache, command)
        return cache

    def _scores(self, name: str, folder: Path, model: str, seed: int) -> dict[str, HeldoutScores]:
        own, file = folder / "own-text", folder / "scores" / "scores.json"
        command = self._commands.writing(own, model, seed=42)
        self._do(f"{name}, seed {seed}: own text", own, [*command, "--generate.prompts", "heldout"])
        told = self._root / "teacher-heldout"
        command = self._commands.writing(told, None, seed=42)
        self._do("the teacher's held-out text", told, [*command, "--generate.prompts", "heldout"])
        named = f"own={own},corpus={self._commands.corpus},teacher={told}"
        self._do(
            f"{name}, seed {seed}: scores",
            file.parent,
            [
                sys.executable, "-m", "stages.score_student", "--student_model", model,
                "--caches", named, "--scores", str(file),
            ],
        )  # fmt: skip
        return scores_of(json.loads(file.read_text(encoding="utf-8"))["caches"])

    def _do(self, title: str, output: Path, command: Sequence[str]) -> None:
        # By its command alone: arms do not read each other, and each stage goes on by itself.
        mark = output.with_name(f"{output.name}.done")
        text = json.dumps(list(command))
        if mark.exists() and mark.read_text(encoding="utf-8") == text:
            return
        print(f"== {title}", flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True)
        mark.write_text(text, encoding="utf-8")


def main() -> None:
    """Run what is missing, then print the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="training steps of every arm")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    arguments = parser.parse_args()
    prepare_environment()
    bench = Bench(FOLDER, arguments.steps)
    arms = [bench.arm(name, seed) for seed in range(arguments.seeds) for name in arguments.arms]
    texts = ("own", "teacher", "corpus")
    print(f"\nheld-out KL (bucketed) in nats after {arguments.steps} steps; mean of "
          f"{arguments.seeds} seeds ± their standard error")  # fmt: skip
    print(f"{'learned from':<16}" + "".join(f"{f'on {text} text':>22}" for text in texts))
    for name in arguments.arms:
        cells = []
        for text in texts:
            values = [arm.mean(text) for arm in arms if arm.name == name]
            cells.append(f"{np.mean(values):>13.4f} ± {_error(values):.4f}")
        print(f"{name:<16}" + "".join(f"{cell:>22}" for cell in cells))
    if {"corpus", "own, 2 rounds"} <= set(arguments.arms):
        by_seed = [
            _of(arms, "corpus", seed).mean("own") - _of(arms, "own, 2 rounds", seed).mean("own")
            for seed in range(arguments.seeds)
        ]
        print(f"two rounds over the corpus's text, own text: {np.mean(by_seed):+.4f} ± "
              f"{_error(by_seed):.4f} nats closer")  # fmt: skip
        print(f"FIGURE rounds_gain_nats_own_text {np.mean(by_seed):.4f}")


def _of(arms: Sequence[Arm], name: str, seed: int) -> Arm:
    return next(arm for arm in arms if arm.name == name and arm.seed == seed)


def _error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


if __name__ == "__main__":
    main()
