"""From the scores of rounds to a report: every student on its own text and on the corpus's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.cache.io.reader import Cache
from pipeline.evaluate.measures import HeldoutScores, MeanError
from pipeline.observe.hardware import describe_environment
from pipeline.report.compose.cache import cache_facts, kl_is_bucketed
from pipeline.report.compose.curves import curves_of, shared_axis, speeds_of
from pipeline.report.compose.measures import measure_of, paired_differences
from pipeline.report.compose.runs import RunFolder, read_run
from pipeline.report.compose.settings import setting_differences, settings_of
from pipeline.report.data.measures import Difference, Row
from pipeline.report.data.report import Report
from pipeline.report.data.runs import Command
from pipeline.report.text.metrics import kl_note
from pipeline.report.text.sentences import difference_sentence

__all__ = ["DRIFT", "RoundScores", "compose_rounds_report"]

DRIFT = "written_drift"
_NOTE = (
    "Own text: what each student itself writes to the held-out prompts, so the texts of two rounds "
    "differ and their difference is not paired. Drift: how far a round has moved the student from "
    "the one that wrote the round's text."
)


@dataclass(frozen=True, slots=True)
class RoundScores:
    """Scores of one round's student."""

    name: str
    number: int
    own: HeldoutScores
    """On what it writes itself to the held-out prompts."""
    written: HeldoutScores | None
    """On the held-out text of the round, which the student before wrote."""
    corpus: HeldoutScores | None
    """On the held-out text of the corpus."""
    bucketed: bool
    """Whether the KL is over a top-k and its tail bucket."""

    @property
    def drift(self) -> MeanError | None:
        """Nats a token from the student that wrote to this one; None where it is not recorded."""
        if self.written is None or DRIFT not in self.written.sums:
            return None
        return self.written.mean(DRIFT)


def compose_rounds_report(
    own: Cache,
    scores: Sequence[RoundScores],
    folders: Sequence[RunFolder],
    *,
    corpus: Cache | None,
    commands: Sequence[Command],
    reason: str,
) -> Report:
    """Put the rounds side by side.

    Args:
        own: the cache of the last student's own text.
        scores: of every round, 0 first.
        folders: of the rounds' trainings.
        corpus: the cache of the corpus's own text; None where nobody learned from it.
        commands: what to type to get each part again.
        reason: why the rounds ended.
    """
    bucketed = scores[-1].bucketed
    runs = [read_run(folder, bucketed=kl_is_bucketed(own)) for folder in folders]
    over = shared_axis(runs)
    sizes = {run.folder.name: run.num_parameters for run in runs}
    rows = tuple(_row(one, sizes.get(one.name), has_corpus=corpus is not None) for one in scores)
    differences = _differences(scores, rows)
    return Report(
        title=f"{len(scores) - 1} rounds: the student writes, the teacher scores",
        summary=difference_sentence(differences[0], rows) if differences else "",
        rows=rows,
        differences=differences,
        curves=tuple(
            curve for run in runs for curve in curves_of(run.metrics, run.folder, over=over)
        ),
        cache=cache_facts(own),
        settings=settings_of(own, runs),
        environment=describe_environment(),
        commands=tuple(commands),
        notes=(kl_note(bucketed=bucketed), _NOTE, f"The rounds ended because: {reason}."),
        speeds=speeds_of(runs),
        setting_differences=setting_differences(runs) if len(runs) > 1 else (),
    )


def _row(scores: RoundScores, num_parameters: int | None, *, has_corpus: bool) -> Row:
    """Return a round's row: its own text first, then the corpus's."""
    suffix = "_bucketed" if scores.bucketed else ""
    metrics = {f"own_kl{suffix}": measure_of(scores.own.mean("kl"))}
    if scores.drift is not None:
        metrics[DRIFT] = measure_of(scores.drift)
    if scores.corpus is not None:
        metrics[f"kl{suffix}"] = measure_of(scores.corpus.mean("kl"))
        for name in ("cross_entropy", "top1_agreement"):
            metrics[name] = measure_of(scores.corpus.mean(name))
    if scores.number:
        detail = f"learned from the text of {scores.number - 1:02d}"
    else:
        detail = "learned from the corpus's own text" if has_corpus else "as it was"
    return Row(scores.name, "distilled", metrics, num_parameters, detail, scores.number + 1)


def _differences(scores: Sequence[RoundScores], rows: Sequence[Row]) -> tuple[Difference, ...]:
    """Return the last round against the first student, then against the round before."""
    found: list[Difference] = []
    last = scores[-1]
    for other in dict.fromkeys((0, len(scores) - 2)):
        if other < 0 or other == len(scores) - 1:
            continue
        key = next(iter(rows[-1].metrics))
        a, b = rows[-1].metrics[key], rows[other].metrics[key]
        error = None
        if a.standard_error is not None and b.standard_error is not None:
            error = math.hypot(a.standard_error, b.standard_error)
        name = scores[other].name
        found.append(Difference(last.name, name, key, a.value - b.value, error, paired=False))
        for difference in paired_differences(last.name, last.corpus, name, scores[other].corpus):
            if difference.metric in ("kl", "cross_entropy"):
                shown = "kl_bucketed" if last.bucketed else "kl"
                metric = shown if difference.metric == "kl" else difference.metric
                found.append(
                    Difference(last.name, name, metric, difference.value, difference.standard_error)
                )
    return tuple(found)
