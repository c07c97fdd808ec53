"""Which runs a sweep is made of: their names, whether the cache can serve them, what they cost."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.amounts import format_bytes
from pipeline.config import Settings, fingerprint
from pipeline.data.mixture.caches import open_caches
from pipeline.data.mixture.settings import CacheShare
from pipeline.errors import CacheError, ConfigError, DistillError, ResourceError
from pipeline.models.device import uses_gpu
from pipeline.observe.memory import available_memory_bytes, free_disk_bytes
from pipeline.student.estimate import estimate
from pipeline.student.inputs import Inputs, open_inputs
from pipeline.student.output.export import is_exported
from pipeline.sweeps.space import Point, short_names, value_text

__all__ = ["Cost", "PlannedRun", "Planner", "check_resources", "settings_digest", "slug"]

_NAME_CHARACTERS = 80
_DIGEST_CHARACTERS = 8


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run takes, by arithmetic."""

    steps: int
    tokens: int
    """Of all steps, repeats counted."""
    teacher_sequences: int
    """Forward passes of a teacher in the training loop, one a sequence, that the cache avoids."""
    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One point with its name, its folder and its cost."""

    name: str
    point: Point
    folder: Path
    digest: str
    """Of everything that decides the losses of the run."""
    settings: Settings
    """The point's, with the run's own folder in it."""
    cost: Cost

    @property
    def finished(self) -> bool:
        """Whether the folder holds the student of this very run."""
        return is_exported(self.folder / "model", self.digest)


class Planner:
    """Turns points into runs against one cache, or against the caches of a mixture.

    Args:
        cache_dir: what all runs read; a point of a mixture has weights of its own.
        runs_dir: where their folders go.
        nproc: processes of one run.
    """

    def __init__(
        self, cache_dir: str | tuple[CacheShare, ...], runs_dir: Path, *, nproc: int
    ) -> None:
        """Read nothing yet."""
        self._cache_dir = cache_dir
        self._runs_dir = runs_dir
        self._nproc = nproc

    def plan(self, point: Point) -> PlannedRun:
        """Return the run of a point.

        Raises:
            ConfigError: the cache cannot serve it; with every mistake.
            CacheError: there is no complete cache.
            ModelError: its student cannot be reached or does not fit.
        """
        inputs = self._open(point.settings, self._runs_dir)
        digest = inputs.identity(self._nproc).digest
        name = f"{slug(point.values)}-{digest[:_DIGEST_CHARACTERS]}"
        folder = self._runs_dir / name
        settings = _placed(point.settings, folder)
        return PlannedRun(name, point, folder, digest, settings, _cost(inputs, self._nproc))

    def plan_all(self, points: Sequence[Point], mistakes: Sequence[str] = ()) -> list[PlannedRun]:
        """Return the runs of all points.

        Args:
            points: of a grid or list, or the corners of a search.
            mistakes: found before; they are reported together with the cache's.

        Raises:
            ConfigError: with every mistake of every point, each once.
            CacheError: there is no complete cache.
        """
        try:
            open_caches(self._cache_dir)
        except CacheError:
            # What is wrong with the file is known without a cache, and worth more than its lack.
            if mistakes:
                raise ConfigError(mistakes=list(dict.fromkeys(mistakes))) from None
            raise
        found: dict[str, list[str]] = {}
        runs: dict[str, PlannedRun] = {}
        twins: list[str] = []
        for point in points:
            try:
                run = self.plan(point)
            except ConfigError as error:
                for line in error.mistakes or (str(error).rstrip("."),):
                    found.setdefault(line, []).append(point.label)
                continue
            except DistillError as error:
                found.setdefault(str(error).rstrip("."), []).append(point.label)
                continue
            twin = runs.get(run.digest)
            if twin is not None:
                twins.append(
                    f"{twin.point.label} and {point.label}: these are the same run; expected "
                    "points that differ in what is trained"
                )
            runs[run.digest] = run
        everything = [*mistakes, *(f"{_where(who)}: {line}" for line, who in found.items()), *twins]
        if everything:
            raise ConfigError(mistakes=list(dict.fromkeys(everything)))
        return list(runs.values())

    def _open(self, settings: Settings, output_dir: Path) -> Inputs:
        placed: Any = _placed(settings, output_dir)
        held = open_caches(self._cache_dir).manifest.identity["scheme"].get("top_k")
        wanted = placed.data.max_entries
        if held is not None and wanted is not None and wanted > int(held):
            raise ConfigError(
                mistakes=[
                    f"data.max_entries: found {wanted}; expected at most {held}, which is what the "
                    "cache holds of each position"
                ]
            )
        return open_inputs(placed)


def check_resources(runs: Sequence[PlannedRun], *, parallel: int, folder: Path) -> None:
    """Reject a sweep whose runs do not fit beside each other.

    Raises:
        ResourceError: too little memory (on a CPU) for so many at a time, or disk for all.
    """
    waiting = [run for run in runs if not run.finished]
    largest = sorted((run.cost.memory_bytes for run in waiting), reverse=True)[:parallel]
    available = available_memory_bytes()
    needed = sum(largest)
    if not uses_gpu() and available is not None and needed > available:
        raise ResourceError(
            f"{len(largest)} runs at a time need about {format_bytes(needed)} of memory, "
            f"{format_bytes(available)} are free",
            do="use a smaller --parallel, or a smaller student",
        )
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    # What a run has written already is replaced, not added to.
    disk = sum(max(run.cost.disk_bytes - _present_bytes(run.folder), 0) for run in waiting)
    free = free_disk_bytes(parent)
    if disk > free:
        raise ResourceError(
            f"{len(waiting)} runs need about {format_bytes(disk)} of disk; "
            f"{format_bytes(free)} are free at {folder}",
            do="free some space, choose another --sweep_dir, or fewer train.keep_checkpoints",
        )


def slug(values: Mapping[str, Any]) -> str:
    """Return values as a part of a folder's name: `alpha-0.5_temperature-2`.

    Letters, digits, `-`, `_` and `.` alone, as the hub allows them in a repository's name: the name
    stands in command lines where `,` and `=` part options (`lm-eval run --model_args`), in
    trackers, and in repositories. In the order of the fields' names, so that a file whose lines are
    put in another order still finds its runs. Not unique by itself: a digest follows it.
    """
    names = short_names(tuple(values))
    parts = [f"{names[name]}-{_word(values[name])}" for name in sorted(values)]
    return "_".join(parts)[:_NAME_CHARACTERS].rstrip(".-_")


def settings_digest(settings: Settings) -> str:
    """Return a digest of a run's settings, for where its cache cannot be seen."""
    return fingerprint(settings.model_dump(mode="json", exclude={"output", "observe"}))


def _word(value: Any) -> str:
    text = value_text(value)
    if isinstance(value, (list, tuple)):
        text = text.replace(" ", ".")
    elif isinstance(value, str) and "/" in value:
        text = value.rstrip("/").rsplit("/", 1)[-1]
    if text.startswith("-"):
        text = f"minus{text[1:]}"
    text = re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
    # The hub allows no two in a row.
    return re.sub(r"([.-])[.-]+", r"\1", text).strip(".-") or "none"


def _placed(settings: Settings, folder: Path) -> Settings:
    data = settings.model_dump(mode="python")
    data["output"] = {"output_dir": str(folder)}
    data["train"]["resume_from_checkpoint"] = "auto"
    return type(settings).model_validate(data)


def _cost(inputs: Inputs, nproc: int) -> Cost:
    plan = estimate(inputs, nproc)
    train = inputs.train
    if train.max_steps is None:
        epochs = float(train.num_train_epochs)
    else:
        pack_length = inputs.data.pack_length or inputs.pack_length()
        packs = plan.tokens_per_epoch / max(plan.fill * pack_length, 1.0)
        epochs = plan.steps * plan.packs_per_step / max(packs, 1.0)
    return Cost(
        steps=plan.steps,
        tokens=round(plan.tokens_per_epoch * epochs),
        teacher_sequences=math.ceil(plan.rows * epochs),
        memory_bytes=plan.memory_bytes,
        disk_bytes=plan.disk_bytes,
    )


def _where(labels: Sequence[str]) -> str:
    rest = len(labels) - 1
    return labels[0] + (f" (and {rest} more)" if rest else "")


def _present_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
