"""The preflight check of what depends on a run's folder, its processes and this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.cache.io.token_ids import shard_token_ids
from pipeline.data.mixture.caches import caches_of, check_apart
from pipeline.data.stream.skipped_shards import read_skipped_shards
from pipeline.errors import ModelError, ResumeError
from pipeline.models.device import uses_gpu
from pipeline.storage.local import require_writable
from pipeline.student.engine.config import check_parallel
from pipeline.student.engine.deepspeed_parts import check_offload_folder
from pipeline.student.engine.kernels import check_kernels
from pipeline.student.estimate import Estimate, check_resources
from pipeline.student.inputs import Inputs, missing_here
from pipeline.student.output.export import is_exported
from pipeline.student.settings.profile_window import check_profile_window
from pipeline.student.training.checkpoint import (
    Checkpoints,
    fitting_processes,
    newest_complete,
)
from pipeline.student.training.distributed import Distributed
from pipeline.student.training.optimizer import check_schedule
from pipeline.student.training.resume import find_resume_point

__all__ = ["preflight"]

_EXAMPLES = 3


def preflight(
    inputs: Inputs, expected: Estimate, distributed: Distributed, *, only_checked: bool
) -> None:
    """Reject a run that training would reject later, before any of its processes loads a model.

    Args:
        inputs: of the run.
        expected: its steps, memory and disk.
        distributed: the processes.
        only_checked: nothing is trained by this process: a launcher may start several after it.

    Raises:
        DistillError: of the kind that training would raise; several at once are one message.
    """
    mistakes = missing_here(inputs)
    with mistakes.collected():
        check_schedule(inputs.train, total_steps=expected.steps)
    if inputs.train.profile_steps is not None:
        with mistakes.collected():
            check_profile_window(inputs.train.profile_steps, total_steps=expected.steps)
    on_gpu = uses_gpu()
    with mistakes.collected():
        # A launcher may start more processes than the one that only checks.
        processes = None if only_checked else distributed.world_size
        check_parallel(inputs.train, world_size=processes, on_gpu=on_gpu)
    with mistakes.collected():
        check_kernels(inputs.student.kernels, on_gpu=on_gpu)
    with mistakes.collected():
        check_offload_folder(inputs.train, on_gpu=on_gpu)
    folder_is_sane = False
    with mistakes.collected():
        require_writable(inputs.output_dir, "output.output_dir")
        folder_is_sane = True
    if folder_is_sane:
        with mistakes.collected():
            _check_resume(inputs, distributed, only_checked=only_checked)
        with mistakes.collected():
            check_resources(inputs, expected)
    if distributed.is_first:
        with mistakes.collected():
            _check_pieces(inputs)
        with mistakes.collected():
            check_apart(inputs.cache)
    mistakes.raise_any()


def _check_resume(inputs: Inputs, distributed: Distributed, *, only_checked: bool) -> None:
    """Find the checkpoint that the run goes on from, as the run does; change nothing."""
    train = inputs.train
    if train.resume_from_checkpoint == "never":
        return
    # Checked by one process before a launcher of several: how many is not known here, but that
    # their number times the packs of one is a step of the checkpoint.
    alone = only_checked and distributed.world_size == 1
    if alone:
        distributed = replace(distributed, world_size=train.sequence_parallel_size)
    digest = inputs.identity(distributed.world_size).digest
    if train.resume_from_checkpoint == "auto" and is_exported(inputs.output_dir / "model", digest):
        return
    try:
        _find(inputs, distributed)
    except ResumeError:
        many = _processes_of_checkpoint(inputs) if alone else None
        if many is None:
            raise
        _find(inputs, replace(distributed, world_size=many))


def _find(inputs: Inputs, distributed: Distributed) -> None:
    checkpoints = Checkpoints(
        inputs.output_dir,
        inputs.identity(distributed.world_size),
        keep=inputs.train.keep_checkpoints,
        world_size=distributed.world_size,
        slices=inputs.train.sequence_parallel_size,
    )
    if find_resume_point(checkpoints, inputs.train, distributed) is not None:
        read_skipped_shards(inputs.output_dir)


def _processes_of_checkpoint(inputs: Inputs) -> int | None:
    """Return how many processes would make the step of the checkpoint; None where none would."""
    wanted = inputs.train.resume_from_checkpoint
    folder = newest_complete(inputs.output_dir) if wanted == "auto" else Path(wanted)
    if folder is None:
        return None
    slices = inputs.train.sequence_parallel_size
    return fitting_processes(folder, packs_of_one=inputs.packs_per_step(slices), slices=slices)


def _check_pieces(inputs: Inputs) -> None:
    """Reject rows with a piece that the student cannot be fed; reads ids where it lacks any."""
    lacked = inputs.vocabulary.lacked
    if lacked is None:
        return
    found: dict[str, str] = {}
    for split in ("train", "heldout") if inputs.train.evaluates else ("train",):
        for cache in caches_of(inputs.cache):
            for path, ids in shard_token_ids(cache, split):
                for piece in lacked(ids):
                    found.setdefault(piece, path)
    if not found:
        return
    shown = ", ".join(f"{p!r} (in {path})" for p, path in list(found.items())[:_EXAMPLES])
    more = f" and {len(found) - _EXAMPLES} more" if len(found) > _EXAMPLES else ""
    raise ModelError(
        f"the cache's sequences hold {shown}{more}, which {'is' if len(found) == 1 else 'are'} no "
        "piece of the student's tokenizer",
        expected="every piece of the sequences in the student's vocabulary",
        do="choose a student that has it, or make the cache from text without it",
    )
