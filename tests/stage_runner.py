"""Run a stage in a process of its own without paying for its imports again.

A fork server imports torch, transformers and DeepSpeed once; each run is a fork of it, with its
own environment, output files and exit code, and may be killed. `real_stage` is the command as a
user types it; it pays seconds for the imports.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
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
    "pipeline.student.run", "pipeline.student.train", "pipeline.student.module",
    "pipeline.teacher.capture", "pipeline.teacher.transformers_engine", "pipeline.loss.head",
    "pipeline.teacher.responses", "pipeline.teacher.transformers_generator",
    "stages.cache_teacher", "stages.train_student", "tests.stage_runner",
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
    """Start `stages.<stage>`; `hook` names one of this module's functions and its arguments."""
    context = _context()
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


def _context() -> Any:
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
        globals()[hook[0]](*hook[1:])
    module = importlib.import_module(f"stages.{stage}")
    code = run_command(lambda: module.main(argv))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_apart(function: Callable[..., None], *arguments: object) -> None:
    """Run a function of a module in a process of its own, for what it would import here."""
    process = _context().Process(target=function, args=arguments)
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


# What a child may do to itself before the stage begins.


def signal_at_sync(number: int, which: int) -> None:
    """Send itself a signal in the middle of its `number`-th write to disk."""
    real, calls = os.fsync, iter(range(1, 1 << 30))

    def fsync(handle: int) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), which)
        real(handle)

    os.fsync = fsync


def kill_at_sync(number: int) -> None:
    """SIGKILL itself there."""
    signal_at_sync(number, signal.SIGKILL)


def signal_at_step(step: int, number: int) -> None:
    """Send itself a signal when training step `step` (from 1) begins."""
    from pipeline.student.train import TrainLoop

    real = TrainLoop._step

    def _step(self: Any, batch: Any) -> Any:
        if batch.step + 1 == step:
            os.kill(os.getpid(), number)
        return real(self, batch)

    TrainLoop._step = _step  # type: ignore[method-assign]


def hub_at(url: str, step_seconds: float = 0.0) -> None:
    """Send the hub's client there: the fork server has read its variables long ago."""
    from huggingface_hub import constants

    constants.ENDPOINT = url
    constants.HF_HUB_OFFLINE = False
    slow_steps(step_seconds)


def slow_steps(seconds: float) -> None:
    """Let each training step take longer, so that what runs beside it has the time."""
    import time

    from pipeline.student.train import TrainLoop

    real = TrainLoop._step

    def _step(self: Any, batch: Any) -> Any:
        time.sleep(seconds)
        return real(self, batch)

    TrainLoop._step = _step  # type: ignore[method-assign]


def kill_before(module: str, name: str) -> None:
    """SIGKILL itself instead of calling `module.name` (a function, or `Class.method`)."""
    owner: Any = importlib.import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, last, lambda *_args, **_options: os.kill(os.getpid(), signal.SIGKILL))


def kill_while_exporting() -> None:
    """SIGKILL itself when the student's folder is half written."""
    from pipeline.student import run

    real = run.export_student

    def export_student(*args: Any, **options: Any) -> None:
        kill_before("pathlib", "Path.write_text")  # of the card, the last file
        real(*args, **options)

    run.export_student = export_student


def forbid_loading() -> None:
    """Make loading any model an error."""
    from pipeline.teacher import capture

    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the teacher was loaded")

    capture.open_engine = refuse  # type: ignore[assignment]
    forbid_writing()


def forbid_writing() -> None:
    """Make loading a teacher that writes an error."""

    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the teacher was loaded to write")

    _set("pipeline.teacher.responses", "open_generator", refuse)


def other_draws() -> None:
    """Draw responses with other seeds than the settings say, as another kind of device might."""
    _set("pipeline.teacher.response_plan", "response_seed", lambda seed, name: seed)


def little_memory(available: int) -> None:
    """Pretend that this many bytes are free."""
    for name in ("pipeline.teacher.forecast", "pipeline.student.forecast"):
        _set(name, "available_memory_bytes", lambda: available)


def little_disk(available: int) -> None:
    """Pretend that this many bytes of disk are free."""
    from pipeline.storage import Store

    _set("pipeline.student.forecast", "free_disk_bytes", lambda _path: available)
    Store.free_bytes = lambda _self: available  # type: ignore[method-assign]


def full_disk(name: str) -> None:
    """Make every write of a file whose path contains `name` fail as on a full disk."""
    import errno

    from pipeline.storage import Store

    real: Callable[..., None] = Store._write_local

    def write(self: Store, path: str, data: bytes, **options: bool) -> None:
        if name in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, path, data, **options)

    Store._write_local = write  # type: ignore[method-assign]


def poison(kind: str, sample_ids: Sequence[str], times: int = 1 << 30) -> None:
    """Make the engine fail for some samples: `raises`, `nan`, `kills` (this process), `breaks`.

    An engine that `breaks` answers nothing any more, as after an error of the device.
    """
    import numpy as np

    from pipeline.teacher.transformers_engine import TransformersEngine

    real, left = TransformersEngine.capture, iter(range(times))
    broken: list[bool] = []

    def capture(self: Any, requests: Any, **options: Any) -> Any:
        if broken:
            raise RuntimeError("CUDA error: device-side assert triggered")
        bad = [i for i, r in enumerate(requests) if r.sample_id in sample_ids or not sample_ids]
        if not bad or next(left, None) is None:
            return real(self, requests, **options)
        if kind == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "nan":
            columns = real(self, requests, **options)
            for index in bad:
                columns[index] = columns[index].copy()
                columns[index][1, 3] = np.nan
            return columns
        if kind == "breaks":
            broken.append(True)
        raise RuntimeError("index out of range in self")

    TransformersEngine.capture = capture  # type: ignore[method-assign]


def faulty_store(fail_rate: float, cut_rate: float, delay_s: float = 0.0) -> None:
    """Make `faulty://` known, a store that fails at these rates and takes its time."""
    from tests.faulty import register

    register(fail_rate=fail_rate, cut_rate=cut_rate, delay_s=delay_s)


def hanging_store(name: str) -> None:
    """Make every write of a file whose path contains `name` wait for ever, as on a dead mount."""
    import time

    from pipeline.storage import Store

    real: Callable[..., None] = Store.write

    def write(self: Store, path: str, data: bytes, **options: bool) -> None:
        while name in path:
            time.sleep(0.1)
        real(self, path, data, **options)

    Store.write = write  # type: ignore[method-assign]


def slow_engine(seconds: float) -> None:
    """Let each call of the engine take longer."""
    import time

    from pipeline.teacher.transformers_engine import TransformersEngine

    real = TransformersEngine.capture

    def capture(self: Any, requests: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return real(self, requests, **options)

    TransformersEngine.capture = capture  # type: ignore[method-assign]


def endless_engine() -> None:
    """Make the engine's call last for ever, outside Python: no signal handler runs meanwhile."""
    from pipeline.teacher.transformers_engine import TransformersEngine

    def capture(*_args: Any, **_options: Any) -> Any:
        import ctypes

        # A mutex locked twice: unlike a sleep, no signal ends the call.
        mutex = ctypes.create_string_buffer(128)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)

    TransformersEngine.capture = capture  # type: ignore[method-assign]


def short_grace(seconds: float) -> None:
    """End the process so many seconds after SIGTERM at the latest."""
    from pipeline.teacher.signals import interruptible

    interruptible.__wrapped__.__defaults__ = (seconds,)  # type: ignore[attr-defined]


def hooks(*several: tuple[Any, ...]) -> None:
    """Apply several hooks."""
    for name, *arguments in several:
        globals()[name](*arguments)


def full_scratch() -> None:
    """Make the folder for temporary files a full disk: the kernel refuses every write."""
    full = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    _set("tempfile", "TemporaryFile", lambda **_: full)


def _set(module: str, name: str, value: Any) -> None:
    setattr(importlib.import_module(module), name, value)
