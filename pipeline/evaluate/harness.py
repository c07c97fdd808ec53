"""Tasks of lm-evaluation-harness on models, its own tasks and those of a local file.

The only file that knows lm_eval. A task is a name of the harness (`arc_easy`), a YAML file, or a
folder of them; with local ones alone nothing is downloaded and the harness's own thousands of task
files are not read.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, ModelError
from pipeline.evaluate.scores import Measured, measured_scores
from pipeline.evaluate.task_files import Task, check_known, files_digest, names_in, sort_tasks
from pipeline.models.device import uses_gpu
from pipeline.models.load import quieten_transformers
from pipeline.program import how_to_install

__all__ = ["Harness", "HarnessRun", "open_harness"]


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
    parallelize: bool = False
    """Spread a model over all GPUs."""
    apply_chat_template: bool = False
    seed: int = 1234


class Harness:
    """The harness with some tasks, for one model after the other; made by `open_harness`."""

    def __init__(self, tasks: Sequence[Task], run: HarnessRun, manager: Any) -> None:
        """Hold the tasks."""
        import transformers
        from lm_eval import __version__

        self.tasks = tuple(tasks)
        self.versions = {
            "lm_eval": str(__version__),
            "transformers": str(transformers.__version__),
        }
        self._run = run
        self._manager = manager

    @contextmanager
    def loaded(self, folder: Path, *, dtype: str = "auto") -> Iterator[Any]:
        """Load a model for `measure`, and free its memory at the end.

        Args:
            folder: as `from_pretrained` loads it.
            dtype: of the weights; `auto` is what the folder says.

        Raises:
            ModelError: the harness cannot load it.
        """
        import torch
        from lm_eval.models.huggingface import HFLM

        on_gpu = uses_gpu()
        try:
            model = HFLM(
                str(folder),
                dtype=dtype,
                device=self._run.device or ("cuda" if on_gpu else "cpu"),
                batch_size=self._run.batch_size,
                parallelize=self._run.parallelize,
                trust_remote_code=False,
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise ModelError(
                f"{folder}: the harness cannot load it ({_reason(error)})",
                expected="a model that transformers loads, and memory for it",
            ) from error
        try:
            yield model
        finally:
            del model
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()

    def measure(self, model: Any, task: Task) -> list[Measured]:
        """Run one task.

        Args:
            model: of `loaded`.
            task: one of `tasks`.

        Returns:
            One for each metric; of a group also for each of its tasks.

        Raises:
            ModelError: the task's data cannot be loaded, or its metric fails.
        """
        from lm_eval import simple_evaluate

        run = self._run
        try:
            found = simple_evaluate(
                model=model,
                tasks=[task.name],
                num_fewshot=run.num_fewshot,
                limit=run.limit,
                apply_chat_template=run.apply_chat_template,
                task_manager=self._manager,
                log_samples=True,
                random_seed=run.seed,
                numpy_random_seed=run.seed,
                torch_random_seed=run.seed,
                fewshot_random_seed=run.seed,
            )
        except Exception as error:
            # Whatever a task's own loader, metric or template raises: the harness has no kinds.
            raise ModelError(
                f"{task.name}: the harness cannot run it ({type(error).__name__}: "
                f"{_reason(error)})",
                expected="a task whose data and metrics can be reached",
                do="check dataset_path and data_files in the task's YAML (relative to where you "
                "are); a task of the harness downloads its data set",
            ) from error
        return measured_scores(found)


@contextmanager
def open_harness(tasks: Sequence[str], run: HarnessRun) -> Iterator[Harness]:
    """Find tasks; while open, models can be measured on them.

    Args:
        tasks: names of the harness, YAML files, folders of YAML files.
        run: how.

    Raises:
        ConfigError: lm_eval is not installed, or a task is none.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "eval-student needs lm-evaluation-harness",
            expected="the package lm_eval in the student's environment",
            do=how_to_install("student"),
        )
    local, named = sort_tasks(tasks)
    quieten_transformers()
    # Read when the hub's client is imported, so before lm_eval is.
    with _offline(wanted=not named):
        from lm_eval.tasks import TaskManager

        manager = TaskManager(
            include_path=[str(path) for path in local if path.is_dir()] or None,
            include_defaults=bool(named),
        )
        check_known(named, manager)
        wanted = {name: Task(name, "") for name in named}
        for path in local:
            digest = files_digest(path)
            wanted |= {name: Task(name, digest) for name in names_in(path, manager)}
        yield Harness(list(wanted.values()), run, manager)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
