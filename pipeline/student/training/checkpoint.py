"""Checkpoints of a run: written beside, marked complete last, newest complete one wins."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.layout.manifest import describe_difference
from pipeline.config import fingerprint
from pipeline.errors import ResumeError
from pipeline.storage import Store
from pipeline.student.settings.train import TrainSettings

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "RunIdentity",
    "fitting_processes",
    "newest_complete",
    "stage_to_go_on_with",
]

_log = logging.getLogger(__name__)
_MARK = "complete.json"
_PREFIX = "step-"
_FOLDER = "checkpoints"


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """Everything that decides the losses of a run."""

    data: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return fingerprint(self.data)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    step: int
    world_size: int


class Checkpoints:
    """The checkpoints below one output folder; every rank may read, rank 0 marks and deletes."""

    def __init__(
        self,
        output_dir: Path,
        identity: RunIdentity,
        *,
        keep: int,
        world_size: int = 1,
        slices: int = 1,
    ) -> None:
        """Read nothing yet; `slices` is how many of the processes share the packs of one."""
        self.root = output_dir / _FOLDER
        self._identity = identity
        self._keep = keep
        self._world_size = world_size
        self._slices = slices

    def folder(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` steps."""
        return self.root / f"{_PREFIX}{step:08d}"

    def newest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint of this run.

        Raises:
            ResumeError: the newest complete one belongs to a run with other settings or another
                cache; the message names the differences.
        """
        folder = newest_complete(self.root.parent)
        return None if folder is None else self.read(folder)

    def read(self, folder: Path) -> Checkpoint:
        """Read one checkpoint's mark and compare it with this run.

        Raises:
            ResumeError: incomplete, or of another run.
        """
        try:
            mark = json.loads((folder / _MARK).read_text(encoding="utf-8"))
            digest, identity = mark["identity_digest"], dict(mark["identity"])
            checkpoint = Checkpoint(folder, int(mark["step"]), int(mark["world_size"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise ResumeError(
                f"{folder}: no complete checkpoint there",
                expected=f"a folder that holds {_MARK}",
                do="name another, or use --resume_from_checkpoint auto",
            ) from None
        if digest != self._identity.digest:
            self._check_packs(folder, identity, checkpoint.world_size)
            self._check_stage(folder, identity)
            difference = describe_difference(identity, self._identity.data)
            raise ResumeError(
                f"{folder}: a checkpoint of another run ({difference})",
                expected="the settings and the cache it was made with",
                do="choose another --output_dir, or start from the beginning with "
                "--resume_from_checkpoint never",
            )
        return checkpoint

    def _check_packs(self, folder: Path, identity: dict[str, Any], world_size: int) -> None:
        """Say how to divide the step, where its size is all that differs."""
        here = self._identity.data
        train = dict(here.get("train", {}))
        theirs = identity.get("train", {}).get("packs_per_step")
        ours, train["packs_per_step"] = train.get("packs_per_step"), theirs
        if ours == theirs or fingerprint({**here, "train": train}) != fingerprint(identity):
            return
        each, rest = divmod(theirs, self._world_size // self._slices)
        raise ResumeError(
            f"{folder}: a step of that run, with {_processes(world_size)}, had {_packs(theirs)}; "
            f"one of this run, with {_processes(self._world_size)}, has {ours}",
            expected=f"{theirs} again",
            do=(
                f"choose per_device_train_batch_size times gradient_accumulation_steps to be {each}"
                if not rest
                else f"start with a number of processes that divides {theirs}"
            )
            + (f" ({self._slices} processes share a pass)" if self._slices > 1 else ""),
        )

    def _check_stage(self, folder: Path, identity: dict[str, Any]) -> None:
        """Say which ZeRO stage to name, where it is all that differs."""
        here = self._identity.data
        theirs = identity.get("train", {}).get("zero_stage")
        train = {**here.get("train", {}), "zero_stage": theirs}
        if fingerprint({**here, "train": train}) != fingerprint(identity):
            return
        raise ResumeError(
            f"{folder}: a checkpoint of ZeRO stage {theirs}, this run has stage "
            f"{here['train']['zero_stage']}",
            expected="the same",
            do=f"run the same command with --train.zero_stage {theirs}",
        )

    def mark_complete(self, step: int, *, world_size: int) -> None:
        """Make the checkpoint count, then delete older and unfinished ones."""
        data = {
            "step": step,
            "world_size": world_size,
            "sequence_parallel_size": self._slices,
            "identity_digest": self._identity.digest,
            "identity": self._identity.data,
        }
        folder = self.folder(step)
        Store(str(folder)).write(_MARK, json.dumps(data, indent=1).encode())
        complete = [f for f in sorted(self.root.glob(f"{_PREFIX}*")) if (f / _MARK).exists()]
        kept = set(complete[-self._keep :])
        for other in self.root.glob(f"{_PREFIX}*"):
            if other not in kept:
                _delete(other)

    def clear(self) -> None:
        """Delete all checkpoints of this output folder (start from the beginning)."""
        for folder in self.root.glob(f"{_PREFIX}*"):
            _delete(folder)


def newest_complete(output_dir: Path) -> Path | None:
    """Return the folder of the newest complete checkpoint of an output folder."""
    for folder in sorted((output_dir / _FOLDER).glob(f"{_PREFIX}*"), reverse=True):
        if (folder / _MARK).exists():
            return folder
    return None


def stage_to_go_on_with(output_dir: Path, train: TrainSettings) -> int | None:
    """Return the ZeRO stage of the checkpoint that a run would go on from; None where none is.

    Where no stage is named, it is chosen by processes and accumulation. A run that goes on with
    other numbers of them keeps its own.
    """
    wanted = train.resume_from_checkpoint
    if wanted == "never":
        return None
    folder = newest_complete(output_dir) if wanted == "auto" else Path(wanted)
    if folder is None:
        return None
    try:
        mark = json.loads((folder / _MARK).read_text(encoding="utf-8"))
        return int(mark["identity"]["train"]["zero_stage"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # `read` says what is wrong with it


def fitting_processes(folder: Path, *, packs_of_one: int, slices: int = 1) -> int | None:
    """Return how many processes make the same step as a checkpoint's run; None where none do.

    Args:
        folder: of the checkpoint.
        packs_of_one: that each process contributes to a step, or each group of `slices`.
        slices: processes that share the packs of one.
    """
    try:
        mark = json.loads((folder / _MARK).read_text(encoding="utf-8"))
        packs, processes = mark["identity"]["train"].get("packs_per_step"), mark["world_size"]
        # A step that is measured in tokens is the same for any number.
        fitting = processes if packs is None else packs * slices / packs_of_one
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return int(fitting) if fitting >= 1 and fitting % slices == 0 else None


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _packs(count: object) -> str:
    return "1 pack" if count == 1 else f"{count} packs"


def _delete(folder: Path) -> None:
    # The mark goes first: killed in the middle, what is left is plainly incomplete.
    (folder / _MARK).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    _log.debug("deleted %s", folder)
