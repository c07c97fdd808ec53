"""Run tasks of lm-evaluation-harness on a student, beside its start, a control and its teacher."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import field_validator

from pipeline.config import Settings, option, parse_command
from pipeline.errors import ResumeError, run_command
from pipeline.program import command_name
from stages.compared import Compared, compared_models

if TYPE_CHECKING:
    from pipeline.evaluate.comparison import ModelScores
    from pipeline.evaluate.harness import Harness, HarnessRun

__all__ = ["EvalRun", "main"]

PROG = command_name("stages.eval_student")


class EvalRun(Settings):
    """Which tasks, and how."""

    output_dir: str = option("runs/default/student", "folder of the finished run")
    tasks: tuple[str, ...] = option(
        ...,
        "tasks, comma-separated: names of lm-evaluation-harness (hellaswag,arc_easy), task YAML "
        "files, or folders of them; with files alone nothing is downloaded",
    )
    compare: tuple[str, ...] = option(
        (),
        "further models to put beside the student: NAME=FOLDER_OR_HUB_ID, comma-separated. Without "
        "asking: `before` (what the student was before training), `control` (of `make distill`) "
        "and `teacher` (by the cache), where they are on this machine",
    )
    without: tuple[str, ...] = option(
        (), "names of models to leave out of the comparison: teacher,before"
    )
    num_fewshot: int | None = option(None, "examples in the prompt (none: as the task says)", ge=0)
    limit: int | None = option(None, "examples of each task (none: all)", ge=1)
    batch_size: int = option(8, "sequences in one forward pass", ge=1)
    device: str | None = option(None, "such as cuda:1 or cpu (none: the GPU where there is one)")
    dtype: str = option(
        "auto",
        "type of the weights (auto: as stored)",
        pattern=r"^(auto|float32|bfloat16|float16)$",
    )
    parallelize: bool = option(False, "spread a model over all GPUs of the machine")
    apply_chat_template: bool = option(False, "ask through the chat template of each model")
    seed: int = option(1234, "of the choice of examples in the prompt", ge=0)

    @field_validator("tasks")
    @classmethod
    def _some(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if not tasks:
            raise ValueError("found none, expected at least one")
        return tasks


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the models, write `output_dir/lm-eval.json`, put the tables into the card."""
    run = parse_command(
        EvalRun,
        list(sys.argv[1:] if argv is None else argv),
        prog=PROG,
        description=__doc__ or "",
        switches={"again": "measure everything again, also what was measured before"},
        examples=[
            f"{PROG} --output_dir runs/default/student --tasks hellaswag,arc_easy",
            f"{PROG} --output_dir runs/default/student --tasks my_task.yaml --without teacher",
            f"{PROG} --tasks hellaswag --compare control=/fsx/control/model",
        ],
    )
    settings = run.settings
    output_dir = Path(settings.output_dir)
    folder = output_dir / "model"
    if not (folder / "config.json").exists():
        raise ResumeError(
            f"{folder}: no finished student",
            expected="a run of train-student that has ended",
            do="run the train-student command again; it goes on where it stopped",
        )
    from pipeline.evaluate.comparison import differences, terminal_tables
    from pipeline.evaluate.harness import HarnessRun, open_harness
    from pipeline.storage import Store
    from pipeline.student.output.card import card_with_tasks

    # Before anything is measured.
    models = compared_models(output_dir, compare=settings.compare, without=settings.without)
    how = HarnessRun(
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        batch_size=settings.batch_size,
        device=settings.device,
        parallelize=settings.parallelize,
        apply_chat_template=settings.apply_chat_template,
        seed=settings.seed,
    )
    with open_harness(settings.tasks, how) as harness:
        scores = [
            _measure(model, harness, how, settings, again="again" in run.switches)
            for model in models
        ]
        versions = harness.versions
    gaps = differences(scores)
    heldout = _heldout_lines(output_dir)
    result = {
        "settings": settings.model_dump(mode="json"),
        "versions": versions,
        "models": [
            {
                "name": model.name,
                "source": model.source,
                "scores": [one.score.to_json() for one in model.measured],
            }
            for model in scores
        ],
        "differences": [gap.to_json() for gap in gaps],
        "heldout": heldout,
    }
    Store(settings.output_dir).write("lm-eval.json", (json.dumps(result, indent=1) + "\n").encode())
    card = (folder / "README.md").read_text(encoding="utf-8")
    Store(str(folder)).write("README.md", card_with_tasks(card, scores, gaps, versions).encode())
    print(f"\n{terminal_tables(scores, gaps)}\n")
    for line in heldout:
        print(line)
    for model in scores:
        print(f"{model.name:<9} {model.source}")
    print(f"written to {output_dir / 'lm-eval.json'} and into {folder / 'README.md'}")
    return 0


def _heldout_lines(output_dir: Path) -> list[str]:
    """Return what the run measured on held-out text: distance to the teacher, acceptance."""
    from pipeline.evaluate.measures import HeldoutScores
    from pipeline.observe.metrics import METRICS_FILE, read_metrics
    from pipeline.report.compose.measures import metrics_of
    from pipeline.report.compose.runs import logged_key
    from pipeline.report.text.metrics import METRICS
    from pipeline.report.text.numbers import format_measure

    file, logged = output_dir / "heldout-after.json", output_dir / METRICS_FILE
    if not file.exists():
        return []
    records = read_metrics(logged) if logged.exists() else []
    bucketed = any("heldout/kl_bucketed" in record.values for record in records)
    lines = []
    for name, measure in metrics_of(HeldoutScores.read(str(file))).items():
        metric = METRICS.get(logged_key(f"heldout/{name}", bucketed=bucketed)[len("heldout/") :])
        if metric is not None and name in ("kl", "uld", "acceptance"):
            shown = " ".join(format_measure(measure, metric)).strip()
            lines.append(f"student   held-out {metric.label}: {shown} {metric.unit}".rstrip())
    return lines


def _measure(
    model: Compared, harness: Harness, how: HarnessRun, settings: EvalRun, *, again: bool
) -> ModelScores:
    """Return a model's scores; each task is kept once it is done, and not done twice."""
    from pipeline.evaluate.comparison import KeptResults, ModelScores
    from pipeline.storage import Store

    kept = KeptResults(Store(settings.output_dir))
    keys = {
        task: kept.key(model.revision, task, how, dtype=settings.dtype, versions=harness.versions)
        for task in harness.tasks
    }
    found = {} if again else {task: kept.get(key) for task, key in keys.items()}
    waiting = [task for task in harness.tasks if not found.get(task)]
    told = "measured before" if not waiting else f"{len(waiting)} of {len(keys)} tasks to run"
    print(f"{model.name:<9} {told}", flush=True)
    if waiting:
        with harness.loaded(model.folder, dtype=settings.dtype) as loaded:
            for task in waiting:
                found[task] = measured = harness.measure(loaded, task)
                kept.put(keys[task], model.source, task, measured)
    everything = [one for task in harness.tasks for one in found[task] or []]
    return ModelScores(model.name, model.source, tuple(everything))


if __name__ == "__main__":
    sys.exit(run_command(main))
