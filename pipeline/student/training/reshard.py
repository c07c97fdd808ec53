"""Reshard a checkpoint of one number of ranks for another: DeepSpeed's universal form.

Under ZeRO each rank's file holds its own part of the optimiser's state. The universal form is one
file per parameter and moment, which any number of ranks can shard. It is made only when a
run goes on with another number of ranks, beside the checkpoint, and deleted once it is loaded.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import IO

from pipeline.amounts import format_bytes
from pipeline.errors import DistillError, ResumeError, StoreError
from pipeline.observe.memory import free_disk_bytes
from pipeline.storage.parallel import usable_cores
from pipeline.student.training.distributed import Distributed

__all__ = ["is_partitioned", "rank_free_copy"]

_log = logging.getLogger(__name__)
_POLL_S = 1.0


def is_partitioned(folder: Path) -> bool:
    """Whether the optimiser's state is in one file per rank (ZeRO), not with the weights."""
    return any(folder.glob("*_optim_states.pt"))


def rank_free_copy(folder: Path, output_dir: Path, distributed: Distributed) -> Path:
    """Write the universal form of the checkpoint `folder` and return where, on every rank.

    All ranks call it. Rank 0 converts and tells the others every second how far it is: a plain
    barrier would end at the timeout meant for dead peers. What a killed run leaves is a `.partial`
    of the output folder, which the next run deletes.

    Raises:
        StoreError: the disk has no room for it.
        ResumeError: the files are damaged, or the optimiser's state has no universal form.
    """
    import torch.distributed as dist

    conversion: _Conversion | None = None
    news: list[Path | DistillError | None] = [None]
    try:
        if distributed.is_first:
            conversion = _Conversion(folder, output_dir / f"reshard.{uuid.uuid4().hex}.partial")
    except DistillError as error:
        news = [error]
    while True:
        if conversion is not None:
            news = [conversion.poll()]
        if distributed.world_size > 1:
            dist.broadcast_object_list(news, src=0)
        if isinstance(news[0], DistillError):
            raise news[0]
        if news[0] is not None:
            return news[0]


class _Conversion:
    """The running conversion of rank 0.

    A process of its own: it forks workers, which a process with threads of gloo or a context on a
    GPU must not do, and its memory is freed with it.
    """

    def __init__(self, folder: Path, temporary: Path) -> None:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        free = free_disk_bytes(temporary.parent)
        # Fragments and merged files exist side by side for a while.
        if 2 * size > free:
            raise StoreError(
                f"{folder}: to go on with another number of processes its {format_bytes(size)} are "
                f"written again, twice for a while; {format_bytes(free)} are free",
                do="free some space, or start the number of processes it was written by",
            )
        self._folder = folder
        # One level deeper: the script writes a file `latest_universal` beside its output.
        self._target = temporary / folder.name
        self._target.mkdir(parents=True)
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        workers = str(min(4, usable_cores()))
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal",
                "--input_folder", str(folder), "--output_folder", str(self._target),
                "--num_extract_workers", workers, "--num_merge_workers", workers,
            ],
            stdout=subprocess.DEVNULL, stderr=self._stderr,
        )  # fmt: skip

    def poll(self) -> Path | DistillError | None:
        """Wait a second at most; return the finished folder, what went wrong, or None."""
        try:
            code = self._process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            return None
        if code == 0:
            return self._target
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").split("\n")
        _log.debug("%s", "\n".join(lines))
        reason = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
        return ResumeError(
            f"{self._folder}: cannot be resharded for another number of processes ({reason[:200]})",
            do="start the number of processes it was written by, or delete that folder to go on "
            "from the checkpoint before it",
        )
