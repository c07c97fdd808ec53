"""What rounds came to: scores of each round's student, when to stop, the report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ResumeError
from pipeline.program import command_name
from stages.round_commands import RoundFolder
from stages.score_student import scores_of

if TYPE_CHECKING:
    from pipeline.report.compose.rounds_report import RoundScores

__all__ = ["read_scores", "stop_reason", "write_rounds_report"]


def read_scores(folder: RoundFolder) -> RoundScores:
    """Return the scores of a round's student.

    Raises:
        ResumeError: it has not been scored.
    """
    from pipeline.report.compose.rounds_report import RoundScores

    file = folder.scores / "scores.json"
    try:
        caches = json.loads(file.read_text(encoding="utf-8"))["caches"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ResumeError(
            f"{file}: no scores of {folder.name}",
            expected="a finished round",
            do="run the same rounds command again; it goes on where it stopped",
        ) from None
    found = scores_of(caches)
    return RoundScores(
        name=folder.name,
        number=folder.number,
        own=found["own"],
        written=found.get("written"),
        corpus=found.get("corpus"),
        bucketed=caches["own"]["distance"] == "kl_bucketed",
    )


def stop_reason(
    before: RoundScores,
    now: RoundScores,
    *,
    least_gain: float | None,
    least_drift: float | None,
) -> str | None:
    """Return why no further round is worth it; None: go on.

    Args:
        before: of the student that wrote the round.
        now: of the student that learned from it.
        least_gain: nats of KL on own text; None: do not ask.
        least_drift: nats a token; None: do not ask.
    """
    gain = before.own.mean("kl").value - now.own.mean("kl").value
    if not math.isfinite(gain):
        return "the scores on own text are not finite"
    if least_gain is not None and gain < least_gain:
        return f"the last round gained {gain:.4f} nats on own text, less than {least_gain:g}"
    drift = now.drift
    if least_drift is not None and drift is not None and drift.value < least_drift:
        return (
            f"the last round moved the student by {drift.value:.4f} nats, less than {least_drift:g}"
        )
    return None


def write_rounds_report(
    root: Path,
    folders: Sequence[RoundFolder],
    *,
    corpus: Path | None,
    command: str,
    reason: str,
) -> Path:
    """Compose and write the report of all rounds, print its table, return the page's path."""
    from pipeline.cache.io.reader import open_cache
    from pipeline.observe.logs import configure_logging
    from pipeline.report import Command, terminal_table, write_report
    from pipeline.report.compose.rounds_report import compose_rounds_report
    from pipeline.report.compose.runs import RunFolder

    configure_logging("warning")
    runs = [
        RunFolder(folder.name, "distilled", folder.student, rank=folder.number + 1)
        for folder in folders
        if folder.trained
    ]
    report = compose_rounds_report(
        open_cache(str(folders[-1].own_text)),
        [read_scores(folder) for folder in folders],
        runs,
        corpus=None if corpus is None else open_cache(str(corpus)),
        commands=[
            Command("everything on this page", command),
            Command("each part by itself", f"{command} --dry-run"),
            *(
                Command(
                    run.name,
                    f"{command_name('stages.train_student')} --config {run.path / 'config.yaml'}",
                )
                for run in runs
            ),
        ],
        reason=reason,
    )
    page = write_report(report, root / "report")
    print("\n" + terminal_table(report))
    return page
