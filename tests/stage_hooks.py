"""What a test can do to a stage before it runs: kill it at a step, spoil its engine or its store.

Each function is named by `stage_runner.start_stage(hook=(name, *arguments))` and runs in the
stage's own process; those of the store, the disk and the memory are in `store_hooks.py`.
"""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.store_hooks import (
    faulty_store,
    full_disk,
    hanging_reads,
    hanging_store,
    little_disk,
    little_disk_to_reshard,
    little_memory,
    replace_name,
)

__all__ = [
    "count_requests", "deadly", "end_at_first_row", "endless_engine", "faulty_store",
    "forbid_loading", "forbid_writing", "full_disk", "hanging_engine", "hanging_reads",
    "hanging_store", "hooks", "hub_at", "kill_at_sync", "kill_before", "kill_while_exporting",
    "little_disk", "little_disk_to_reshard", "little_memory", "note_units", "other_draws", "poison",
    "replace_name",
    "short_grace", "signal_at_step", "signal_at_sync", "slow_engine", "slow_steps", "slow_writing",
    "unanswered",
]  # fmt: skip


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
    from pipeline.student.training.loop import TrainLoop

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

    from pipeline.student.training.loop import TrainLoop

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
    from pipeline.student.output import publish

    real = publish.export_student

    def export_student(*args: Any, **options: Any) -> None:
        kill_before("pathlib", "Path.write_text")  # of the card, the last file
        real(*args, **options)

    publish.export_student = export_student


def note_units(log: str) -> None:
    """Append a line for each unit that this worker begins or has prepared, with its tokens."""
    work = importlib.import_module("pipeline.teacher.preparation.work")
    processes = importlib.import_module("pipeline.teacher.preparation.processes")
    real = processes.prepare_here

    def note(what: str, unit: Any, tokens: int = 0) -> None:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{what} {unit.index} {tokens}\n")

    def prepare_here(intake: Any, folder: Any, unit: Any, **options: Any) -> Any:
        note("begun", unit)
        summary = real(intake, folder, unit, **options)
        note("done", unit, sum(block.num_tokens for block in summary.blocks))
        return summary

    class Here(processes.UnitProcesses):  # type: ignore[misc, name-defined]
        """Prepares on a thread of this process what another process would."""

        def __init__(self, recipe: Any, _processes: int) -> None:
            self.made = recipe.intake()
            self.folder = processes.PreparedFolder(processes.Store(recipe.url))
            self.thread = ThreadPoolExecutor(1)

        def submit(self, unit: Any, *, is_last: bool) -> Any:
            def prepare() -> bytes:
                done = prepare_here(self.made, self.folder, unit, is_last=is_last)
                self.folder.commit(done)
                return bytes(done.to_bytes())

            return self.thread.submit(prepare)

        def close(self) -> None:
            self.thread.shutdown(wait=False, cancel_futures=True)

    work.UnitProcesses = Here
    corpus = importlib.import_module("pipeline.teacher.preparation.corpus")
    corpus.prepare_here = prepare_here  # of the first unit


def end_at_first_row(mark: str) -> None:
    """Write the time when the engine has answered first, and end."""
    import time

    from pipeline.teacher.fleet.quarantine import GuardedEngine

    real = GuardedEngine.capture

    def capture(self: Any, *args: Any, **options: Any) -> Any:
        real(self, *args, **options)
        with open(mark, "w", encoding="utf-8") as file:
            file.write(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    GuardedEngine.capture = capture  # type: ignore[method-assign]


def count_requests(log: str) -> None:
    """Append a byte for each request to S3, of this process and of those that it starts."""
    import s3fs

    real = s3fs.S3FileSystem._call_s3

    async def _call_s3(self: Any, *args: Any, **options: Any) -> Any:
        with open(log, "ab") as file:
            file.write(b".")
        return await real(self, *args, **options)

    s3fs.S3FileSystem._call_s3 = _call_s3
    # The processes that tokenise are not of this process: here it does all of it.
    note_units(os.devnull)


def forbid_loading() -> None:
    """Make loading any model an error."""

    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the teacher was loaded")

    replace_name("pipeline.teacher.capture.task", "open_engine", refuse)
    forbid_writing()


def forbid_writing() -> None:
    """Make loading a teacher that writes an error."""

    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the teacher was loaded to write")

    replace_name("pipeline.teacher.generation.run", "open_generator", refuse)


def other_draws() -> None:
    """Draw responses with other seeds than the settings say, as another kind of device might."""
    replace_name("pipeline.teacher.generation.plan", "response_seed", lambda seed, name: seed)


def slow_writing(mark: str, seconds: float) -> None:
    """Let each call of the writing teacher take longer, and note that it has begun."""
    import time

    from pipeline.teacher.generation.transformers import TransformersGenerator

    real = TransformersGenerator.write

    def write(self: Any, requests: Sequence[Any], **options: Any) -> Any:
        with open(mark, "a", encoding="utf-8"):
            time.sleep(seconds)
        return real(self, requests, **options)

    TransformersGenerator.write = write  # type: ignore[method-assign]


def deadly(names: Sequence[str]) -> None:
    """SIGKILL itself when the writing teacher is given one of these responses."""
    from pipeline.teacher.generation.transformers import TransformersGenerator

    real = TransformersGenerator.write

    def write(self: Any, requests: Sequence[Any], **options: Any) -> Any:
        if any(request.response_id in names for request in requests):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, requests, **options)

    TransformersGenerator.write = write  # type: ignore[method-assign]


def unanswered(names: Sequence[str]) -> None:
    """Let the writing teacher raise for some responses."""
    from pipeline.teacher.generation.transformers import TransformersGenerator

    real = TransformersGenerator.write

    def write(self: Any, requests: Sequence[Any], **options: Any) -> Any:
        if any(request.response_id in names for request in requests):
            raise RuntimeError("index out of range")
        return real(self, requests, **options)

    TransformersGenerator.write = write  # type: ignore[method-assign]


def poison(kind: str, sample_ids: Sequence[str], times: int = 1 << 30) -> None:
    """Make the engine fail for some samples: `raises`, `nan`, `kills` (this process), `breaks`.

    An engine that `breaks` answers nothing any more, as after an error of the device.
    """
    import numpy as np

    from pipeline.teacher.engines.transformers import TransformersEngine

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


def hanging_engine(after: int) -> None:
    """Let the engine answer so many calls, and never return from the next, as a stuck device."""
    import time

    from pipeline.teacher.engines.transformers import TransformersEngine

    real, calls = TransformersEngine.capture, iter(range(after))

    def capture(self: Any, requests: Any, **options: Any) -> Any:
        while next(calls, None) is None:
            time.sleep(0.1)
        return real(self, requests, **options)

    TransformersEngine.capture = capture  # type: ignore[method-assign]


def slow_engine(seconds: float) -> None:
    """Let each call of the engine take longer."""
    import time

    from pipeline.teacher.engines.transformers import TransformersEngine

    real = TransformersEngine.capture

    def capture(self: Any, requests: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return real(self, requests, **options)

    TransformersEngine.capture = capture  # type: ignore[method-assign]


def endless_engine() -> None:
    """Make the engine's call last for ever, outside Python: no signal handler runs meanwhile."""
    from pipeline.teacher.engines.transformers import TransformersEngine

    def capture(*_args: Any, **_options: Any) -> Any:
        import ctypes

        # A mutex locked twice: unlike a sleep, no signal ends the call.
        mutex = ctypes.create_string_buffer(128)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)

    TransformersEngine.capture = capture  # type: ignore[method-assign]


def short_grace(seconds: float) -> None:
    """End the process so many seconds after SIGTERM at the latest."""
    from pipeline.teacher.fleet.signals import interruptible

    interruptible.__wrapped__.__defaults__ = (seconds,)  # type: ignore[attr-defined]


def hooks(*several: tuple[Any, ...]) -> None:
    """Apply several hooks."""
    for name, *arguments in several:
        globals()[name](*arguments)
