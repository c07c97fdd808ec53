"""The processes of one worker that tokenise: a unit goes in, its files and its summary come out."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path

from pipeline.corpus.intake import Intake
from pipeline.corpus.prepared.folder import PreparedFolder
from pipeline.corpus.prepared.summary import UnitSummary
from pipeline.corpus.prepared.units import Unit
from pipeline.corpus.reading import open_reading
from pipeline.corpus.samples import Block, prepare_unit
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources.rows import RowSource
from pipeline.errors import DistillError, ResourceError
from pipeline.storage import Store
from pipeline.storage.parallel import usable_cores

__all__ = ["Recipe", "UnitProcesses", "default_processes", "prepare_here"]

_MOST_PROCESSES = 32
"""By default: each takes about 0.6 GB, most of it transformers and the tokenizer."""
_NICE = 10
"""Below the process that feeds the engine: a GPU that waits costs more than a unit that does."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How units become samples; can be sent to another process."""

    new_intake: Callable[..., Intake]
    """Called with `reading`: the reader of units, all else bound."""
    settings: CorpusSettings
    source: RowSource
    url: str
    """Of the prepared corpus."""
    answered: bool
    """Whether rows have answers; false where the teacher writes them."""

    def intake(self) -> Intake:
        """Return a reader of units.

        Raises:
            CorpusError: the source cannot be read.
        """
        return self.new_intake(
            reading=open_reading(self.settings, source=self.source, answered=self.answered)
        )


def prepare_here(
    intake: Intake, folder: PreparedFolder, unit: Unit, *, is_last: bool
) -> UnitSummary:
    """Prepare a unit in this process and write its blocks; the summary is the caller's to commit.

    Raises:
        CorpusError: the source cannot be read, or has bad rows and the run refuses them.
        StoreError: the store fails.
    """

    def write(number: int, block: Block) -> None:
        block.summary.checksums = folder.write_block(
            unit.index, number, (block.train, block.candidates)
        )

    return prepare_unit(intake, unit, write=write, is_last=is_last)


def default_processes(
    units: int, *, devices: Path = Path("/dev"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return how many processes tokenise: the cores of this process, shared by the GPUs' workers.

    One worker runs for each GPU of a machine (or for all of them, under tensor parallelism, and
    then uses less than it could).
    """
    gpus = len(list(devices.glob("nvidia[0-9]*")))
    cores = usable_cores(cgroup=cgroup)
    return max(1, min(units, _MOST_PROCESSES, cores // max(1, gpus)))


class UnitProcesses:
    """Some processes, each with a tokenizer of its own."""

    def __init__(self, recipe: Recipe, processes: int) -> None:
        """Start none yet; the first unit does."""
        # Not fork: this process may hold a GPU, threads and the tokenizer's own pool.
        self._pool = ProcessPoolExecutor(
            processes,
            mp_context=get_context("spawn"),
            initializer=_begin,
            initargs=(pickle.dumps(recipe),),
        )

    def submit(self, unit: Unit, *, is_last: bool) -> Future[bytes]:
        """Prepare a unit and commit it; the future gives its summary, as bytes."""
        return self._pool.submit(_work, unit, is_last)

    @staticmethod
    def result(future: Future[bytes]) -> UnitSummary:
        """Return what a future gives.

        Raises:
            CorpusError, StoreError: as `prepare_here` says.
            ResourceError: the process was killed.
        """
        try:
            found = future.result()
        except BrokenProcessPool:
            raise ResourceError(
                "a process that tokenises was killed, most likely for want of memory",
                do="set --corpus.processes to a smaller number, and run the same command again",
            ) from None
        summary = UnitSummary.from_bytes(found)
        assert summary is not None
        return summary

    def close(self) -> None:
        """End the processes at once; what they had begun is begun again by whoever comes."""
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


_mine: tuple[Intake, PreparedFolder] | DistillError | None = None


def _begin(recipe: bytes) -> None:
    """Set this process up."""
    global _mine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    # Warnings of the settings are the parent's to give, once.
    logging.disable(logging.WARNING)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what runs side by side
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    made: Recipe = pickle.loads(recipe)
    try:
        _mine = made.intake(), PreparedFolder(Store(made.url))
    except DistillError as error:
        _mine = error  # told by the first unit: an error here would only break the pool


def _end_with_parent() -> None:
    """End this process when its parent does, however that does: a pool's own wait has no end."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(unit: Unit, is_last: bool) -> bytes:
    assert _mine is not None
    if isinstance(_mine, DistillError):
        raise _mine
    intake, folder = _mine
    summary = prepare_here(intake, folder, unit, is_last=is_last)
    # Here and not in the parent, which may be busy: this process begins the next unit at once, and
    # what is not committed when the worker is killed is prepared again.
    folder.commit(summary)
    return summary.to_bytes()
