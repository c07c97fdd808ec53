"""Run tasks of lm-evaluation-harness on a finished student; results beside it and in its card."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import field_validator

from pipeline.config import Settings, option, parse_command
from pipeline.errors import ResumeError, run_command
from pipeline.program import command_name

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
    num_fewshot: int | None = option(None, "examples in the prompt (none: as the task says)", ge=0)
    limit: int | None = option(None, "examples of each task (none: all)", ge=1)
    batch_size: int = option(8, "sequences in one forward pass", ge=1)
    device: str | None = option(None, "such as cuda:1 or cpu (none: the GPU where there is one)")
    dtype: str = option(
        "auto",
        "type of the weights (auto: as stored)",
        pattern=r"^(auto|float32|bfloat16|float16)$",
    )
    apply_chat_template: bool = option(False, "ask through the student's chat template")
    seed: int = option(1234, "of the choice of examples in the prompt", ge=0)

    @field_validator("tasks")
    @classmethod
    def _some(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if not tasks:
            raise ValueError("found none, expected at least one")
        return tasks


def main(argv: Sequence[str] | None = None) -> int:
    """Measure `output_dir/model`, write `output_dir/lm-eval.json`, put the table into the card."""
    run = parse_command(
        EvalRun,
        list(sys.argv[1:] if argv is None else argv),
        prog=PROG,
        description=__doc__ or "",
        examples=[
            f"{PROG} --output_dir runs/default/student --tasks hellaswag,arc_easy",
            f"{PROG} --output_dir runs/default/student --tasks my_task.yaml",
        ],
    ).settings
    folder = Path(run.output_dir) / "model"
    if not (folder / "config.json").exists():
        raise ResumeError(
            f"{folder}: no finished student",
            expected="a run of train-student that has ended",
            do="run the train-student command again; it goes on where it stopped",
        )
    from pipeline.evaluate.harness import HarnessRun, run_tasks
    from pipeline.storage import Store
    from pipeline.student.output.card import card_with_tasks

    how = HarnessRun(
        num_fewshot=run.num_fewshot,
        limit=run.limit,
        batch_size=run.batch_size,
        device=run.device,
        apply_chat_template=run.apply_chat_template,
        seed=run.seed,
    )
    scores, versions = run_tasks(folder, run.tasks, how, dtype=run.dtype)
    result = {
        "settings": run.model_dump(mode="json"),
        "versions": versions,
        "scores": [score.to_json() for score in scores],
    }
    Store(run.output_dir).write("lm-eval.json", (json.dumps(result, indent=1) + "\n").encode())
    card = (folder / "README.md").read_text(encoding="utf-8")
    Store(str(folder)).write("README.md", card_with_tasks(card, scores, versions).encode())
    for score in scores:
        error = "" if score.standard_error is None else f" ± {score.standard_error:.4f}"
        print(f"{score.task}\t{score.metric}\t{score.value:.4f}{error}")
    print(f"written to {Path(run.output_dir) / 'lm-eval.json'} and into {folder / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
