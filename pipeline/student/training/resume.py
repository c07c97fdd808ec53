"""Where a run resumes: which checkpoint, whether it fits this number of ranks, and its loading."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ResumeError
from pipeline.student.settings.train import TrainSettings
from pipeline.student.training.checkpoint import Checkpoint, Checkpoints
from pipeline.student.training.deepspeed_engine import DeepSpeedEngine
from pipeline.student.training.distributed import Distributed
from pipeline.student.training.optimizer import has_rank_free_form
from pipeline.student.training.reshard import is_partitioned, rank_free_copy

__all__ = ["ResumePoint", "find_resume_point", "load_resume_point"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A checkpoint, and whether it has to be resharded for this number of ranks."""

    checkpoint: Checkpoint
    reshard: bool


def find_resume_point(
    checkpoints: Checkpoints, train: TrainSettings, distributed: Distributed
) -> ResumePoint | None:
    """Return where this run resumes, None for its beginning; loads nothing.

    Raises:
        ResumeError: the checkpoint is of another run, or cannot go to this number of ranks.
    """
    wanted = train.resume_from_checkpoint
    if wanted == "never":
        if distributed.is_first:
            checkpoints.clear()
        return None
    found = checkpoints.newest() if wanted == "auto" else checkpoints.read(Path(wanted))
    if found is None:
        return None
    reshard = found.world_size != distributed.world_size and is_partitioned(found.folder)
    if reshard and not has_rank_free_form(train):
        raise ResumeError(
            f"{found.folder}: written by {found.world_size} processes, this run has "
            f"{distributed.world_size}, and the state of {train.optim} under ZeRO cannot be "
            "resharded",
            expected="the same number, or an AdamW",
            do=f"start with NPROC={found.world_size}, or from the beginning with "
            "--resume_from_checkpoint never",
        )
    return ResumePoint(found, reshard)


def load_resume_point(engine: DeepSpeedEngine, point: ResumePoint, output_dir: Path) -> int:
    """Load the checkpoint, whatever number of ranks wrote it, and return its step.

    Raises:
        ResumeError: its files are damaged.
        StoreError: the disk has no room to reshard it.
    """
    folder = point.checkpoint.folder
    if not point.reshard:
        return engine.load(folder)
    copy = rank_free_copy(folder, output_dir, engine.distributed)
    before, now = point.checkpoint.world_size, engine.distributed.world_size
    _log.info("%s was written by %d ranks, resharded for %d", folder, before, now)
    step = engine.load(copy, average=folder)
    engine.barrier()
    if engine.distributed.is_first:
        shutil.rmtree(copy.parent)
    return step
