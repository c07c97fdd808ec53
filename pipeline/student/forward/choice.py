"""Which way a run's micro-batches go through the body: by setting, by trial, as before."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from pipeline.errors import ModelError, ResumeError
from pipeline.storage import Store
from pipeline.student.forward.trial import PackingTrial, WayTried, run_packing_trial
from pipeline.student.forward.ways import BodyForward, Way
from pipeline.student.settings.student import WAY_FILE

__all__ = ["choose_way", "read_way", "record_way"]

_log = logging.getLogger(__name__)
_WAYS: tuple[Way, ...] = ("boundaries", "positions", "alone")


def choose_way(
    forward: BodyForward,
    model: Any,
    *,
    wanted: str,
    before: Way | None,
    device: Any,
    gather: Callable[[Any], list[Any]],
    longest_row: int | None = None,
    longest_sequence: int | None = None,
) -> Way:
    """Try the student and set the way of `forward`; all ranks together, before the first step.

    Args:
        forward: the body.
        model: of which it is the body, with its weights on the device.
        wanted: `auto`, `packed` or `alone` (`student.forward`).
        before: of the run that is resumed, which keeps its way; None for one that begins.
        device: where the weights are.
        gather: returns every rank's value on every rank.
        longest_row: tokens of the longest packed row there will be.
        longest_sequence: of the longest sequence.

    Raises:
        ModelError: packed is asked for, or was used before, and is not right here; or the model is
            not causal.
        ResumeError: the run that is resumed went another way than the setting says.
    """
    if before is not None and wanted != "auto" and (wanted == "alone") != (before == "alone"):
        raise ResumeError(
            f"student.forward: found {wanted}, but this run began with its sequences "
            f"{_described(before)}",
            expected="the same way to the end",
            do="leave student.forward as it was, or start from the beginning with "
            "--resume_from_checkpoint never",
        )
    alone = "alone" in (wanted, before)
    here = run_packing_trial(
        forward,
        model,
        device=device,
        longest_row=longest_row,
        longest_sequence=longest_sequence,
        packed=not alone,
    )
    if alone:
        forward.way = "alone"
        return forward.way
    trial = _agreed(here, gather)
    kept = next((tried.way for tried in trial.tried if tried.right and tried.way == before), None)
    way = kept if before is not None else trial.right
    if way is None and (wanted == "packed" or before is not None):
        raise ModelError(
            f"{type(model).__name__} cannot be packed here: {_difference(trial)}",
            expected="sequences that see nothing of their neighbours",
            do=_remedy(trial)
            + ("" if before else "--student.forward alone, which runs them one at a time"),
        )
    if way is None:
        _log.warning(
            "the student's sequences go through it one at a time, because %s. Short sequences cost "
            "more this way: each is a pass of its own%s",
            _difference(trial),
            f". Packed would need {' and '.join(trial.missing)}" if trial.missing else "",
        )
        way = "alone"
    forward.way = way
    return way


def read_way(folder: Path) -> Way | None:
    """Return the way that a run went so far; None where it says nothing of it.

    Raises:
        ResumeError: the record is not readable.
    """
    try:
        way = json.loads((folder / WAY_FILE).read_text(encoding="utf-8"))["way"]
        return _WAYS[_WAYS.index(way)]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise ResumeError(
            f"{folder / WAY_FILE}: not readable",
            expected="how this run's sequences went through the student",
            do="start from the beginning with --resume_from_checkpoint never",
        ) from None


def record_way(folder: Path, way: Way) -> None:
    """Write down the way, for the runs that resume this one."""
    Store(str(folder)).write(WAY_FILE, json.dumps({"way": way}).encode())


def _agreed(trial: PackingTrial, gather: Callable[[Any], list[Any]]) -> PackingTrial:
    """Return the trial with the worst of every way over all ranks."""
    ranks = cast(list[PackingTrial], gather(trial))
    tried = []
    for every in zip(*(rank.tried for rank in ranks), strict=True):
        worst: WayTried = max(every, key=lambda one: (not one.right, max(one.error, one.seen)))
        tried.append(worst)
    missing = sorted({name for rank in ranks for name in rank.missing})
    return PackingTrial(tuple(tried), tuple(missing), trial.lengths)


def _difference(trial: PackingTrial) -> str:
    best = trial.best
    if best.refusal:
        return f"the model refuses ({best.refusal})"
    if best.seen > best.error / 10:
        return (
            "packed sequences see their neighbours (other neighbours change hidden states by "
            f"{best.seen:.2g} of their size)"
        )
    return f"packed hidden states differ from those alone by {best.error:.2g} of their size"


def _remedy(trial: PackingTrial) -> str:
    return f"install {' and '.join(trial.missing)}, or use " if trial.missing else "use "


def _described(way: Way) -> str:
    return "one at a time" if way == "alone" else "packed"
