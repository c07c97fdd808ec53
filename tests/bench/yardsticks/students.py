"""Teachers and students before training: pruned in depth or width, the teacher adapted or not.

Each is made once for the sizes of a run and kept below `runs/bench/yardsticks`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.models.resolve import resolve_model
from pipeline.student.build.prune import prune_model
from tests.bench.fidelity_data import FOLDER, Hidden
from tests.bench.quality import LAYERS, student_folder
from tests.bench.yardsticks.arms import Start
from tests.bench.yardsticks.data import loaded
from tests.bench.yardsticks.targets import cross_entropy
from tests.bench.yardsticks.training import TeacherRows, train
from tests.bench.yardsticks.width import Shape, importance_of, neurons_for, pruned_in_width

__all__ = ["RESULTS", "adapted_teacher", "parameters_of", "plain_teacher", "start_folder"]

RESULTS = FOLDER / "yardsticks"
CHANNELS, HEADS = 384, 6
"""Of 576 and 9; neurons as many as bring the model to the parameters of the one cut in depth."""
DROPPED = (12, 20)
"""Layers that the near student lacks: that of `tests.bench.fidelity_data`."""
CALIBRATION = 16
"""Sequences on which importance is measured."""
TEACHER_RATE = 5e-5
"""Learning rate of the short fine-tuning of the teacher."""


def plain_teacher() -> Path:
    """Return the embedded teacher's folder."""
    return resolve_model("embedded", revision=None, role="teacher").path


def parameters_of(model: Any) -> int:
    """Return the number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def start_folder(start: Start, calibration: Hidden) -> Path:
    """Return the student from which arms start; cut from the plain teacher in any case."""
    if start == "reconstructed":
        return student_folder()
    depth = prune_model(plain_teacher(), LAYERS, FOLDER / f"quality-cut-{len(LAYERS)}")
    if start == "depth":
        return depth
    if start == "near":
        kept = [layer for layer in range(LAYERS[-1] + 1) if layer not in DROPPED]
        return prune_model(plain_teacher(), kept, RESULTS / "near")

    def make() -> Any:
        teacher = loaded(plain_teacher())
        neurons = neurons_for(parameters_of(loaded(depth)), teacher.config, CHANNELS, HEADS)
        importance = importance_of(teacher, calibration.input_ids[:CALIBRATION])
        return pruned_in_width(teacher, importance, Shape(CHANNELS, HEADS, neurons))

    return _kept(RESULTS / f"width-{CHANNELS}-{HEADS}", make)


def adapted_teacher(text: Hidden, per_step: int) -> Path:
    """Return the teacher after one pass over a text of the corpus; its head stays as it is."""

    def make() -> Any:
        teacher, rows = loaded(plain_teacher()), TeacherRows.none(text)
        rate = TEACHER_RATE
        train(teacher, rows, cross_entropy, seed=0, per_step=per_step, learning_rate=rate)
        return teacher

    return _kept(RESULTS / f"adapted-teacher-{len(text.input_ids)}-{per_step}", make)


def _kept(folder: Path, make: Callable[[], Any]) -> Path:
    """Return a model's folder, made where it is not there: it is complete or absent."""
    if not (folder / "config.json").exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        make().save_pretrained(partial)
        partial.rename(folder)
    return folder
