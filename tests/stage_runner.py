"""Run a stage in a process of its own without paying for its imports again.

A fork server imports torch, transformers and DeepSpeed once; each run is a fork of it, with its
own environment, output files and exit code, and may be killed. `real_stage` is the command as a
user types it; it pays seconds for the imports.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "COLUMNS": "200",
}
_PRELOAD = [
    "torch", "transformers", "deepspeed", "transformers.models.llama.modeling_llama",
    "pipeline.student.run", "pipeline.student.training.loop", "pipeline.student.training.module",
    "pipeline.teacher.prepare", "pipeline.teacher.engines.transformers", "pipeline.loss.head",
    "pipeline.teacher.capture.run", "pipeline.teacher.generation.run",
    "pipeline.teacher.generation.transformers",
    "stages.cache_teacher", "stages.train_student", "tests.stage_runner", "tests.stage_preload",
    # What they import on their way.
    "pandas", "pyarrow.dataset", "pyarrow.parquet", "fsspec.implementations.local",
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine", "transformers.generation",
    "transformers.conversion_mapping", "tokenizers", "jinja2", "safetensors.torch",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Result:
    """How a stage ended."""

    code: int
    out: str
    err: str

    def ok(self) -> Result:
        """Return itself when the stage succeeded; else fail with what it said."""
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self

    def refused(self, code: int) -> str:
        """Return the one message of a refusal without its `error: `."""
        lines = self.err.splitlines()
        assert self.code == code, f"exit code {self.code}, not {code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        assert len(starts) == 1, self.err
        return "\n".join(lines[starts[0] :]).removeprefix("error: ")


class Running:
    """A stage that runs beside the test."""

    def __init__(self, process: Any, files: tuple[Path, Path]) -> None:
        self.process = process
        self._files = files

    def log(self) -> str:
        """Return what it has written to standard error so far."""
        return self._files[1].read_text(errors="replace")

    def wait(self, timeout: float = 120) -> Result:
        """Return its end; a stage that hangs is killed and fails the test."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"hung for {timeout} s\n{self._files[1].read_text()}")
        out, err = (file.read_text(errors="replace") for file in self._files)
        return Result(self.process.exitcode, out, err)


def start_stage(
    stage: str,
    argv: Sequence[object],
    *,
    files: Path,
    hook: tuple[Any, ...] = (),
    env: Mapping[str, str] | None = None,
) -> Running:
    """Start `stages.<stage>`; `hook` names a function of `stage_hooks.py` and its arguments."""
    context = fork_context()
    files.mkdir(parents=True, exist_ok=True)
    number = len(list(files.iterdir()))
    logs = (files / f"{number}.out", files / f"{number}.err")
    for log in logs:
        log.touch()
    arguments = [str(argument) for argument in argv]
    process = context.Process(target=_child, args=(stage, arguments, hook, dict(env or {}), logs))
    process.start()
    return Running(process, logs)


def run_stage(stage: str, argv: Sequence[object], *, files: Path, **options: Any) -> Result:
    """Run `stages.<stage>` to its end."""
    return start_stage(stage, argv, files=files, **options).wait()


def real_stage(
    stage: str,
    argv: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> Result:
    """Run `python -m stages.<stage>` as a user would."""
    return run_python(["-m", f"stages.{stage}", *argv], env=env, timeout=timeout)


def run_python(
    arguments: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    timeout: float = 240,
) -> Result:
    """Run this Python with arguments."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def fork_context() -> Any:
    """Return what forks processes from the server that has imported everything."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _child(
    stage: str,
    argv: list[str],
    hook: tuple[Any, ...],
    env: dict[str, str],
    logs: tuple[Path, Path],
) -> None:
    os.environ.update({**ENVIRONMENT, **env})
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in env:
            os.environ.pop(name, None)
    for number, log in enumerate(logs, start=1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    from pipeline.errors import run_command

    if hook:
        getattr(importlib.import_module("tests.stage_hooks"), hook[0])(*hook[1:])
    module = importlib.import_module(f"stages.{stage}")
    code = run_command(lambda: module.main(argv))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_apart(function: Callable[..., None], *arguments: object) -> None:
    """Run a function of a module in a process of its own, for what it would import here."""
    process = fork_context().Process(target=function, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 0, f"{function.__name__} ended with {process.exitcode}"


def extract_weights(checkpoint: Path, target: Path) -> None:
    """Save the module's weights of a DeepSpeed checkpoint as safetensors."""
    import torch
    from safetensors.torch import save_file

    (file,) = checkpoint.glob("mp_rank_00_model_states.pt")
    # Our module holds the model under a name of its own.
    state = torch.load(file, weights_only=False)["module"]
    save_file({name.removeprefix("model."): v.clone() for name, v in state.items()}, target)
