"""What each recipe takes of memory, disk and time, by the dry run's own arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.api.settings import StudentRun, TeacherRun
from pipeline.config import Settings, parse_command
from pipeline.models.resolve import read_model_config
from pipeline.models.shape import ModelShape, model_shape
from pipeline.observe.devices import BANDWIDTH_SHARE, READING_SHARE, TRAINING_SHARE
from pipeline.student.costs import TrainingMemory, training_flops, training_memory
from pipeline.teacher.costs import cache_bytes, device_memory, reading_flops, writing_rate
from pipeline.teacher.sparsify.scheme import capture_scheme
from tests.recipes import plan
from tests.recipes.plan import MODELS, RECIPES, TOKENS, Student, Teacher

__all__ = [
    "StudentCost", "TeacherCost", "model_config", "read_recipe", "shape_of", "student_cost",
    "student_shape", "teacher_cost",
]  # fmt: skip

GIB = 1 << 30
SettingsT = TypeVar("SettingsT", bound=Settings)


@dataclass(frozen=True, slots=True)
class TeacherCost:
    """Of stage one."""

    memory: int
    """Bytes that must fit a GPU."""
    limit: float
    """Bytes of it that vLLM may take."""
    sequences: int
    """Written at a time; 0 where the teacher only reads."""
    gpu_hours: float
    """For `TOKENS`."""
    cache: int
    """Bytes for `TOKENS`."""


@dataclass(frozen=True, slots=True)
class StudentCost:
    """Of stage two."""

    memory: TrainingMemory
    step_tokens: int
    gpu_hours: float
    """For `TOKENS` and one epoch."""


def read_recipe(file: str, model: type[SettingsT]) -> SettingsT:
    """Read a configuration as its stage does."""
    return parse_command(model, ["--config", str(RECIPES / file)], prog="", description="").settings


def model_config(name: str, folder: Path) -> dict[str, Any]:
    """Return a published configuration as the stages read it from a model's folder.

    Args:
        name: the hub's.
        folder: where a model's folder is made of the fixture.
    """
    place = folder / name.replace("/", "--")
    place.mkdir(parents=True, exist_ok=True)
    text = (MODELS / f"{name.split('/')[1]}.json").read_text(encoding="utf-8")
    (place / "config.json").write_text(text, encoding="utf-8")
    return read_model_config(place)


def shape_of(name: str, folder: Path) -> ModelShape:
    """Return the sizes of a published model."""
    return model_shape(model_config(name, folder))


def student_shape(run: StudentRun, folder: Path) -> ModelShape:
    """Return the sizes of a recipe's student."""
    shape, kept = shape_of(run.student.model, folder), run.student.keep_layers
    return shape.pruned(kept) if kept else shape


def teacher_cost(recipe: Teacher, folder: Path) -> TeacherCost:
    """Compute what stage one takes."""
    run, device = read_recipe(recipe.file, TeacherRun), recipe.device
    settings, length = run.teacher.for_device(on_gpu=True), run.corpus.max_length
    capture = run.capture.for_device(on_gpu=True)
    shape = shape_of(settings.model, folder)
    memory = device_memory(shape, settings, capture, max_length=length)
    limit = settings.gpu_memory_utilization * device.memory_gib * GIB
    seconds = reading_flops(shape, tokens=TOKENS) / (READING_SHARE * device.flops)
    share, sequences = plan.SUPERVISED_READ, 0
    if run.generate.enabled:
        share = plan.SUPERVISED_WRITTEN
        one = device_memory(
            shape, settings, capture, max_length=length, resident=10 * TOKENS
        ) - memory  # fmt: skip
        a_token = one / (10 * TOKENS)
        # Half of the longest on average; vLLM's own limit is 256.
        sequences = min(256, int((limit - memory) / a_token / (length / 2)))
        rate = writing_rate(
            shape, settings,
            sequences=max(1, sequences), context=length / 4,
            bytes_per_s=BANDWIDTH_SHARE * device.bytes_per_s,
        )  # fmt: skip
        seconds += TOKENS * share / rate * settings.tensor_parallel_size
    return TeacherCost(
        memory=memory,
        limit=limit,
        sequences=sequences,
        gpu_hours=seconds / 3600,
        cache=cache_bytes(capture_scheme(run.capture), tokens=TOKENS, loss_tokens=share * TOKENS),
    )


def student_cost(recipe: Student, folder: Path) -> StudentCost:
    """Compute what stage two takes."""
    run = read_recipe(recipe.file, StudentRun)
    shape = student_shape(run, folder)
    length = run.data.pack_length or read_recipe(recipe.teacher, TeacherRun).corpus.max_length
    tokens = run.train.per_device_train_batch_size * length
    memory = training_memory(
        shape, run.student, run.train, run.loss,
        tokens=tokens, world_size=recipe.gpus, dtype=run.train.dtype(on_gpu=True),
        device_bytes=int(recipe.device.memory_gib * GIB),
    )  # fmt: skip
    flops = training_flops(shape, run.student, tokens=TOKENS)
    return StudentCost(
        memory=memory,
        step_tokens=tokens * run.train.gradient_accumulation_steps * recipe.gpus,
        gpu_hours=flops / (TRAINING_SHARE * recipe.device.flops) / 3600,
    )
