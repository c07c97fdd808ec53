"""Write the recipes' README with its cost table: `make recipes`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.api.settings import StudentRun, TeacherRun
from pipeline.observe.devices import BANDWIDTH_SHARE, READING_SHARE, TRAINING_SHARE
from tests.recipes import plan
from tests.recipes.costs import (
    GIB,
    read_recipe,
    shape_of,
    student_cost,
    student_shape,
    teacher_cost,
)
from tests.recipes.plan import H100, RECIPES, SMALL, STUDENTS, TEACHERS, TOKENS

__all__ = ["PAGE", "page"]

PAGE = RECIPES / "README.md"
_HEAD = """# Recipes

Pairs of models that people run, as complete configurations of both stages:

```
make cache-teacher CONFIG=stages/configs/recipes/qwen3-32b/teacher-chat.yaml
make train-student CONFIG=stages/configs/recipes/qwen3-32b/student-4b.yaml NPROC=8
```

A folder is a teacher, `teacher-*.yaml` a cache of it and `student-*.yaml` what learns from one;
the comments in a file say why. `chat` reads chats, `reasoning` and `writes` let the teacher write
the answers. `one-24gb` is for one card of 24 GB and `64-gpus` for eight nodes; the others are for
a node of eight GPUs of 80 GB. More GPUs are more workers of stage one (the same command on the
same `cache_dir`) and more processes of stage two. Flags change what a file says:
`ARGS="--dataset_name my.jsonl"`.

**None of these was run here.** `make recipes` writes this page. Memory, bytes and hours come from
the arithmetic of `--dry-run` (`pipeline/teacher/costs.py`, `pipeline/student/costs.py`) over the
models' published configurations ([how they were written down](../../../tests/recipes/README.md));
tests hold every file to these configurations, and this page to the arithmetic. Nothing here is a
measurement of quality, and learning rates are starting points.
"""


def page() -> str:
    """Return the page."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        return "\n".join([_HEAD, *_stage_one(place), *_stage_two(place), *_assumptions(), ""])


def _stage_one(folder: Path) -> Iterator[str]:
    yield from (
        "## Stage one",
        "",
        f"For {TOKENS / 1e6:.0f} M tokens of corpus. *Needed* is what must fit of a GPU, *of* what",
        "vLLM may take there; *at a time* is how many answers are written together.",
        "",
        "| configuration | teacher, parameters | GPUs a worker | needed of, GiB | at a time "
        "| GPU hours | cache, GiB |",
        "|---|---|---|---|---|---|---|",
    )
    for recipe in TEACHERS:
        run, cost = read_recipe(recipe.file, TeacherRun), teacher_cost(recipe, folder)
        shape = shape_of(run.teacher.model, folder)
        yield (
            f"| [{recipe.file}]({recipe.file}) | {run.teacher.model}, {_giga(shape.parameters)} "
            f"| {run.teacher.tensor_parallel_size} x {recipe.device.name} "
            f"| {cost.memory / GIB:.1f} of {cost.limit / GIB:.1f} | {cost.sequences or '-'} "
            f"| {_hours(cost.gpu_hours)} | {cost.cache / GIB:.1f} |"
        )
    yield ""


def _stage_two(folder: Path) -> Iterator[str]:
    yield from (
        "## Stage two",
        "",
        f"For {TOKENS / 1e6:.0f} M tokens and one epoch. *State* is weights, gradients and the",
        "optimiser's moments on the device; *host* is what is offloaded to the CPU's memory.",
        "",
        "| configuration | student, parameters | GPUs | state + activations + head = all of, GiB "
        "| host, GiB | tokens a step | GPU hours |",
        "|---|---|---|---|---|---|---|",
    )
    for recipe in STUDENTS:
        run, cost = read_recipe(recipe.file, StudentRun), student_cost(recipe, folder)
        memory, shape = cost.memory, student_shape(run, folder)
        adapters = ", LoRA" if run.student.lora.enabled else ""
        layers = f", {shape.layers} layers" if run.student.keep_layers else ""
        yield (
            f"| [{recipe.file}]({recipe.file}) | {run.student.model}{layers}, "
            f"{_giga(shape.parameters)}{adapters} | {recipe.gpus} x {recipe.device.name} "
            f"| {memory.state / GIB:.1f} + {memory.activations / GIB:.1f} + "
            f"{memory.head / GIB:.1f} = {memory.device / GIB:.1f} of {recipe.device.memory_gib:g} "
            f"| {f'{memory.offloaded / GIB:.1f}' if memory.offloaded else '-'} "
            f"| {cost.step_tokens:,} | {_hours(cost.gpu_hours)} |"
        )
    yield ""


def _assumptions() -> Iterator[str]:
    yield from ("## Assumed", "")
    for device in (H100, SMALL):
        yield (
            f"- {device.name}, by its data sheet: {device.memory_gib:g} GiB that programs can use, "
            f"{device.flops / 1e12:g} TFLOP/s dense in bfloat16 (FP8 weights are counted at the "
            f"same rate), {device.bytes_per_s / 1e12:g} TB/s"
        )
    yield (
        f"- reading reaches {READING_SHARE:.0%} of the peak operations, training "
        f"{TRAINING_SHARE:.0%}, writing {BANDWIDTH_SHARE:.0%} of the bandwidth; on your "
        "machine `--dry-run` times a few samples instead"
    )
    yield (
        f"- {plan.SUPERVISED_READ:.0%} of the tokens of chats are supervised, "
        f"{plan.SUPERVISED_WRITTEN:.0%} where the teacher writes; answers are half as long as they "
        "may be"
    )
    yield (
        "- attention's own products, padding of packs and loading are left out of the hours: long "
        "sequences take more"
    )


def _giga(count: int) -> str:
    return f"{count / 1e9:.1f} G"


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours < 100 else f"{hours:,.0f}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit(0)
