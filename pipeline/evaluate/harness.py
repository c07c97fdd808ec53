"""Tasks of lm-evaluation-harness on a finished student, its own and those of a local file.

The only file that knows lm_eval. A task is a name of the harness (`arc_easy`), a YAML file, or a
folder of them; with local ones alone nothing is downloaded and the harness's own thousands of task
files are not read.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, ModelError
from pipeline.models.load import quieten_transformers
from pipeline.program import how_to_install

__all__ = ["HarnessRun", "TaskScore", "run_tasks"]


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task."""

    task: str
    version: str
    metric: str
    filter: str
    """How the answers were read out of the text; `none` for log-likelihoods."""
    value: float
    standard_error: float | None
    """None where the harness gives none."""
    num_fewshot: int
    examples: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class HarnessRun:
    """How the tasks are run."""

    num_fewshot: int | None = None
    """None: as each task says."""
    limit: int | None = None
    """Examples of each task; None: all."""
    batch_size: int = 8
    device: str | None = None
    """None: the GPU where there is one."""
    apply_chat_template: bool = False
    seed: int = 1234


def run_tasks(
    folder: Path, tasks: Sequence[str], run: HarnessRun, *, dtype: str = "auto"
) -> tuple[list[TaskScore], dict[str, str]]:
    """Measure a model folder.

    Args:
        folder: as `from_pretrained` loads it.
        tasks: names of the harness, YAML files, folders of YAML files.
        run: how.
        dtype: of the weights; `auto` is what the folder says.

    Returns:
        One score for each metric of each task, in the order of the tasks, and versions by name.

    Raises:
        ConfigError: lm_eval is not installed, or a task is none.
        ModelError: the model or a task's data cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "eval-student needs lm-evaluation-harness",
            expected="the package lm_eval in the student's environment",
            do=how_to_install("student"),
        )
    local, named = _sort(tasks)
    quieten_transformers()
    # Read when the hub's client is imported, so before lm_eval is.
    with _offline(wanted=not named):
        import torch
        import transformers
        from lm_eval import __version__, simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager(
            include_path=[str(path) for path in local if path.is_dir()] or None,
            include_defaults=bool(named),
        )
        _check_known(named, manager)
        wanted = [*named, *(name for path in local for name in _names_in(path, manager))]
        device = run.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            found = simple_evaluate(
                model="hf",
                model_args={"pretrained": str(folder), "dtype": dtype, "trust_remote_code": False},
                tasks=list(dict.fromkeys(wanted)),
                num_fewshot=run.num_fewshot,
                limit=run.limit,
                batch_size=run.batch_size,
                device=device,
                apply_chat_template=run.apply_chat_template,
                task_manager=manager,
                log_samples=False,
                random_seed=run.seed,
                numpy_random_seed=run.seed,
                torch_random_seed=run.seed,
                fewshot_random_seed=run.seed,
            )
        except Exception as error:
            # Whatever a task's own loader, metric or template raises: the harness has no kinds.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"{', '.join(tasks)}: the harness cannot run them ({type(error).__name__}: "
                f"{reason})",
                expected="tasks whose data and metrics can be reached",
                do="check dataset_path and data_files in the task's YAML (relative to where you "
                "are); a task of the harness downloads its data set",
            ) from error
    versions = {"lm_eval": str(__version__), "transformers": str(transformers.__version__)}
    return _scores(found), versions


def _sort(tasks: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Part tasks into local files or folders and names of the harness."""
    local, named, mistakes = [], [], []
    for task in tasks:
        path = Path(task).expanduser()
        if path.suffix in (".yaml", ".yml") or os.sep in task or path.is_dir():
            if path.exists():
                local.append(path)
            else:
                mistakes.append(
                    f"tasks: found {task}, expected an existing YAML file or folder of them, or "
                    "the name of a task of the harness"
                )
        else:
            named.append(task)
    if mistakes:
        raise ConfigError(mistakes=mistakes)
    return local, named


def _names_in(path: Path, manager: Any) -> list[str]:
    """Return what stands for the tasks of a file (its path) or of a folder (groups, or all tasks).

    Raises:
        ConfigError: it defines none.
    """
    root = path.resolve()
    if path.is_file():
        # Not read as YAML: a task may hold tags of the harness, such as !function.
        text = path.read_text(encoding="utf-8", errors="replace")
        names = [str(root)] if re.search(r"^(task|group):", text, re.MULTILINE) else []
    else:
        names = [
            name
            for name, entry in manager.task_index.items()
            if entry.yaml_path is not None and root in Path(entry.yaml_path).resolve().parents
        ]
    if not names:
        raise ConfigError(
            f"tasks: {path} defines no task",
            expected="YAML with `task:`, `dataset_path:`, `output_type:` and so on, as "
            "lm-evaluation-harness has it",
        )
    return sorted([name for name in names if name in manager.all_groups] or names)


def _check_known(names: Sequence[str], manager: Any) -> None:
    from difflib import get_close_matches

    unknown = [name for name in names if name not in manager.task_index]
    if not unknown:
        return
    mistakes = []
    for name in unknown:
        near = get_close_matches(name, manager.all_tasks, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        mistakes.append(f"tasks: {name} is no task of the harness{hint} (all: `lm-eval ls tasks`)")
    raise ConfigError(mistakes=mistakes)


def _scores(found: Mapping[str, Any] | None) -> list[TaskScore]:
    """Flatten the harness's `results`, whose keys are `metric,filter`."""
    assert found is not None, "the harness returns None on other ranks alone"
    scores = []
    for task, values in found["results"].items():
        samples = found.get("n-samples", {}).get(task, {})
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, int | float) and math.isfinite(error)
            scores.append(
                TaskScore(
                    task=str(task),
                    version=str(found["versions"].get(task, "")),
                    metric=metric,
                    filter=filtered,
                    value=float(value),
                    standard_error=float(error) if known else None,
                    num_fewshot=int(found.get("n-shot", {}).get(task, 0)),
                    examples=int(samples.get("effective", 0)),
                )
            )
    return scores


@contextmanager
def _offline(*, wanted: bool) -> Iterator[None]:
    """Keep the hub's clients from asking the net where all is local."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    if wanted:
        os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
