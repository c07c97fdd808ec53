"""Stage one by all GPUs of a machine: a worker a teacher, one log, one bar, one exit code."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import IO

from pipeline.errors import ConfigError, DistillError, run_command
from pipeline.program import command_name, module_name
from pipeline.progress import PROGRESS_FILE, Progress
from stages.cache_teacher import TeacherRun, teacher_command
from stages.flags import take_flag

__all__ = ["GPUS", "NPROC", "main", "plan_devices"]

PROG = command_name("stages.workers")
NPROC, GPUS = "--nproc", "--gpus"
_DONE = (0, 5)
"""Exit codes of a worker that saw the cache complete."""
_POLL_S = 0.5
_PORT = "--observe.prometheus_port"


def main(argv: Sequence[str] | None = None) -> int:
    """Start workers of stage one and wait for them: `--nproc N`, `--gpus all` or `--gpus 0,1`.

    All other arguments are those of the stage.
    """
    rest = list(sys.argv[1:] if argv is None else argv)
    rest, wanted = take_flag(rest, NPROC)
    rest, named = take_flag(rest, GPUS)
    rest = rest[1:] if rest[:1] == ["--"] else rest
    if wanted is not None and (not wanted.isdigit() or not int(wanted)):
        raise ConfigError(f"{NPROC}: found {wanted!r}", expected="a number of workers, from 1")
    command = teacher_command(rest)
    once = sorted(command.switches)
    if once and {"verify", "retry_quarantined"} & set(once):
        raise ConfigError(
            f"--{once[0].replace('_', '-')} with several workers",
            expected="one worker, which looks at the whole cache",
            do=f"leave out {NPROC} and {GPUS} (NPROC= and GPUS= of make)",
        )
    devices = plan_devices(
        command.settings, None if wanted is None else int(wanted), named, _visible_gpus()
    )
    stage = [sys.executable, "-m", module_name("stages.cache_teacher"), *rest]
    if once:
        return subprocess.run(stage, check=False).returncode
    port = command.settings.observe.prometheus_port
    with tempfile.TemporaryDirectory(prefix="distil-workers-") as folder:
        workers = [
            _Worker(
                number, own, Path(folder) / f"{number}.json",
                [*stage, *([_PORT, str(port + number)] if port is not None and number else [])],
            )
            for number, own in enumerate(devices)
        ]  # fmt: skip
        return _run(workers, command.settings.observe.progress_every_s)


def plan_devices(
    run: TeacherRun, nproc: int | None, named: str | None, visible: Sequence[str]
) -> list[dict[str, str]]:
    """Return the environment of each worker: the GPUs of its teacher.

    Args:
        run: says how many GPUs share a teacher.
        nproc: workers; None: as many as the GPUs allow.
        named: `all`, or GPUs as `CUDA_VISIBLE_DEVICES` takes them; None: all that are needed.
        visible: the GPUs that can be seen; none on a CPU.

    Raises:
        ConfigError: fewer GPUs than that takes, or GPUs by name where Ray chooses them.
    """
    if run.teacher.is_placed_by_ray:
        if named is not None:
            raise ConfigError(
                f"{GPUS} {named} for a teacher that Ray places",
                expected=f"a number of workers: Ray gives each its {run.teacher.devices} GPUs",
                do=f"use {NPROC} (NPROC= of make)",
            )
        return [{} for _ in range(nproc or 1)]
    each = run.worker_gpus
    chosen = [name for name in named.split(",") if name] if named and named != "all" else visible
    if not chosen:
        if named is not None or nproc is None:
            raise ConfigError(
                f"{GPUS} {named or 'all'}: no GPU can be seen",
                expected="a GPU, or a number of workers on the CPU",
                do=f"use {NPROC} (NPROC= of make)",
            )
        return [{} for _ in range(nproc)]
    most = len(chosen) // each
    if (nproc or 1) > most:
        shared = f", {each} of which share a teacher" if each > 1 else ""
        raise ConfigError(
            f"{NPROC} {nproc or 1}: found {len(chosen)} GPUs{shared}",
            expected=f"at least {(nproc or 1) * each} GPUs",
            do=f"use a smaller {NPROC}, more {GPUS}, or a smaller teacher.tensor_parallel_size",
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(chosen[number * each : (number + 1) * each])}
        for number in range(nproc or most)
    ]


def _visible_gpus() -> tuple[str, ...]:
    from pipeline.sweeps.slots import visible_gpus
    from pipeline.teacher.engines.vllm_start import before_cuda

    before_cuda()
    return visible_gpus()


@dataclass(slots=True)
class _Worker:
    """A process of stage one, its lines, and how far it says it is."""

    number: int
    environment: Mapping[str, str]
    numbers: Path
    command: Sequence[str]
    process: subprocess.Popen[str] | None = None
    errors: list[str] = field(default_factory=list)
    """The message that it ended with."""
    results: list[str] = field(default_factory=list)
    """What it printed on standard output."""
    readers: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Start it; it ends with this process."""
        self.process = subprocess.Popen(
            self.command,
            env={**os.environ, **self.environment, PROGRESS_FILE: str(self.numbers)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            preexec_fn=_end_with_parent,
        )  # fmt: skip
        for stream, read in (
            (self.process.stderr, self._log), (self.process.stdout, self._print),
        ):  # fmt: skip
            thread = threading.Thread(target=read, args=(stream,), daemon=True)
            thread.start()
            self.readers.append(thread)

    @property
    def code(self) -> int | None:
        """Its exit code as a shell gives it; None while it runs."""
        assert self.process is not None
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    @property
    def where(self) -> str:
        """What it is called in messages."""
        gpus = self.environment.get("CUDA_VISIBLE_DEVICES")
        return f"worker {self.number}" + (f" (GPU {gpus})" if gpus else "")

    def _log(self, stream: IO[str]) -> None:
        for line in stream:
            text = line.rstrip("\n")
            if self.errors or text.startswith("error: "):
                self.errors.append(text)  # told once for all workers, at the end
            else:
                _show(f"worker {self.number}: {text}")

    def _print(self, stream: IO[str]) -> None:
        self.results += [line.rstrip("\n") for line in stream]


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG


def _show(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # above the bar, where there is one


def _run(workers: Sequence[_Worker], every_s: float) -> int:
    """Run workers to their end; return one exit code for all."""
    stopped = list[int]()

    def stop(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)

    with _handled(signal.SIGTERM, stop), _handled(signal.SIGINT, stop):
        for worker in workers:
            worker.start()
        _watch(workers, every_s, stopped)
    for worker in workers:
        for reader in worker.readers:
            reader.join()
    _print_results(workers)
    if stopped:
        _tell_messages(workers)
        return 128 + stopped[0]
    done = [worker for worker in workers if worker.code in _DONE]
    _tell_messages(done or workers)
    return max((worker.code or 0) for worker in done) if done else _first_code(workers)


@contextlib.contextmanager
def _handled(number: int, handler: object) -> Iterator[None]:
    before = signal.signal(number, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        signal.signal(number, before)


def _watch(workers: Sequence[_Worker], every_s: float, stopped: Sequence[int]) -> None:
    """Show one bar while workers run; name each that ends before the work does.

    Once `stopped` holds a signal, each worker is told to stop, again until it has ended: one that
    was being started may not have heard it.
    """
    bar = _Bar(every_s)
    named: set[int] = set()
    while True:
        running = False
        for worker in workers:
            code = worker.code
            running |= code is None
            if stopped and code is None and worker.process is not None:
                worker.process.terminate()
            if (
                code is not None
                and code not in _DONE
                and worker.number not in named
                and not stopped
            ):
                named.add(worker.number)
                why = f": {worker.errors[0].removeprefix('error: ')}" if worker.errors else ""
                _show(
                    f"{worker.where} ended with exit code {code}{why}; the others go on"
                    if any(other.code is None for other in workers)
                    else f"{worker.where} ended with exit code {code}{why}"
                )
        bar.show([worker.numbers for worker in workers])
        if not running:
            bar.close()
            return
        time.sleep(_POLL_S)


class _Bar:
    """The sum of what the workers say: of those that are at the newest kind of work."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._order: list[str] = []
        self._bar: Progress | None = None

    def show(self, files: Sequence[Path]) -> None:
        said = []
        for file in files:
            with contextlib.suppress(OSError, ValueError):
                said.append(json.loads(file.read_text(encoding="utf-8")))
        for one in said:
            if one["description"] not in self._order:
                self._order.append(one["description"])
                self._next(one["description"], one["unit"])
        if not said or self._bar is None:
            return
        newest = [one for one in said if one["description"] == self._order[-1]]
        # What one worker did, another that came later counts among what was there before.
        before = min(one["initial"] for one in newest)
        done = before + sum(one["done"] - one["initial"] for one in newest)
        total = max((one["total"] or 0) for one in newest)
        if total:
            self._bar.retarget(total)
        if before and not self._bar.done:
            self._bar.count_before(before)
        if done > self._bar.done:
            self._bar.advance(done - self._bar.done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _next(self, description: str, unit: str) -> None:
        self.close()
        self._bar = Progress(unit=unit, description=description, every_s=self._every_s)


def _print_results(workers: Sequence[_Worker]) -> None:
    """Print what all workers say once, what each says with its number."""
    spoken = [worker.results for worker in workers if worker.results]
    shared = [
        line for line in dict.fromkeys(chain(*spoken)) if all(line in lines for lines in spoken)
    ]
    for worker in workers:
        for line in worker.results:
            if line not in shared:
                print(f"worker {worker.number}: {line}")
    for line in shared:
        print(line)
    sys.stdout.flush()


def _tell_messages(workers: Sequence[_Worker]) -> None:
    """Print each message that workers ended with, once."""
    for message in dict.fromkeys("\n".join(worker.errors) for worker in workers if worker.errors):
        print(message, file=sys.stderr, flush=True)


def _first_code(workers: Sequence[_Worker]) -> int:
    """Return the code of the first worker; of one that explained itself before one that died."""
    codes = [worker.code or 0 for worker in workers]
    explained = [code for code in codes if code < 128]
    return (explained or codes)[0] or DistillError.exit_code


if __name__ == "__main__":
    sys.exit(run_command(main))
