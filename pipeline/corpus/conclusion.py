"""What all units say together: the counts of the corpus, warnings, and what stops a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pipeline.corpus.intake import Intake
from pipeline.corpus.prepared.summary import CorpusSummary, UnitReport
from pipeline.corpus.sample import CorpusCounts
from pipeline.corpus.settings import CorpusSettings
from pipeline.errors import CorpusError

__all__ = ["conclude_rows", "conclude_samples", "log_repairs"]

_log = logging.getLogger(__name__)


def conclude_rows(found: CorpusSummary, intake: Intake) -> None:
    """Report the bad rows, the turns without an end and the split of a small corpus.

    Raises:
        CorpusError: the corpus is empty, has too many bad rows, or holds no row out.
    """
    report, settings = found.report, intake.settings
    name = settings.dataset_name
    if report.bad.count == report.rows and settings.on_bad_row != "refuse":
        raise CorpusError(
            f"{name}: none of its {report.rows} rows can be used",
            expected="rows that can be read and rendered",
            do="check --corpus.format, --corpus.loss_on and --chat_template:" + report.bad.listed(),
        )
    report.bad.finish(report.rows, settings)
    _report_limit(report, intake)
    _report_text(report, intake)
    if found.moved_rows:
        _log.warning(
            "heldout_fraction %g picks %d of %d rows; the %d rows of the smallest hashes are "
            "held out as well",
            settings.heldout_fraction, found.heldout_rows - found.moved_rows, found.usable_rows,
            found.moved_rows,
        )  # fmt: skip
    if not intake.rule.is_off and found.usable_rows and not found.heldout_rows:
        raise CorpusError(
            f"{name}: no row is held out (usable rows: {found.usable_rows})",
            expected="at least 2, one to train on and one to evaluate on",
            do="give more rows, or --corpus.heldout_fraction 0 to train without evaluation"
            + report.bad.besides(),
        )


def conclude_samples(found: CorpusSummary, intake: Intake) -> CorpusCounts:
    """Do the same and report the samples; return their counts.

    Raises:
        CorpusError: as `conclude_rows` says, or there is no sample to train on.
    """
    conclude_rows(found, intake)
    counts, settings, bad = found.counts(), intake.settings, found.report.bad
    name = settings.dataset_name
    if not counts.samples:
        raise CorpusError(
            f"{name}: none of its {counts.rows} rows gave a sample ({_losses(counts, settings)})",
            expected="at least one sequence with a supervised token",
            do="check --corpus.format, --corpus.loss_on and --max_length" + bad.besides(),
        )
    if not counts.train:
        raise CorpusError(
            f"{name}: all of its {counts.samples} samples are held out",
            expected="samples to train on",
            do="read more rows, or lower --corpus.heldout_fraction" + bad.besides(),
        )
    _log.info(
        "corpus %s: %d rows -> %d samples (%d train, %d held out), %d tokens, %d supervised",
        name, counts.rows, counts.samples, counts.train, counts.heldout, counts.tokens,
        counts.loss_tokens,
    )  # fmt: skip
    if counts.truncated_rows:
        _log.warning(
            "%d rows (%.1f %%) were longer than max_length %d: truncated, %d tokens (%.1f %%) "
            "cut off",
            counts.truncated_rows, 100 * counts.truncated_rows / counts.rows, settings.longest,
            counts.truncated_tokens, _percent_cut(counts),
        )  # fmt: skip
    if counts.split_rows:
        _log.info("%d long rows became %d parts", counts.split_rows, counts.split_parts)
    if counts.dropped_no_labels or counts.dropped_overlong:
        _log.warning("samples left out: %s", _losses(counts, settings))
    wanted = settings.heldout_samples
    if wanted is not None and found.heldout_rows < wanted:
        _log.warning(
            "only %d of at most %d rows are held out: heldout_fraction %g picked no more",
            found.heldout_rows, wanted, settings.heldout_fraction,
        )  # fmt: skip
    elif not counts.heldout:
        _log.warning("no sample is held out: nothing to evaluate on")
    return counts


def log_repairs(replaced: int, notes: Mapping[str, int]) -> None:
    """Log what was repaired or left out of the rows without harm to their text."""
    if replaced:
        _log.warning(
            "%d texts were not valid Unicode: U+FFFD stands in place of each half of a "
            "surrogate pair",
            replaced,
        )
    for note, rows in sorted(notes.items(), key=lambda item: (-item[1], item[0])):
        _log.warning("%d rows: %s", rows, note)


def _report_limit(report: UnitReport, intake: Intake) -> None:
    limit, total = intake.settings.num_samples, intake.reading.source.total
    if limit is None or report.rows < limit or total == limit:
        return
    of_all = "" if total is None else f" of {total}"
    _log.warning(
        "%s: only the first %d rows%s are read, as corpus.num_samples says",
        intake.settings.dataset_name, report.rows, of_all,
    )  # fmt: skip


def _report_text(report: UnitReport, intake: Intake) -> None:
    settings = intake.settings
    name = settings.dataset_name
    log_repairs(report.replaced, report.notes)
    if report.unended and settings.loss_on == "assistant":
        ends = "" if intake.renderer is None else ", ".join(intake.renderer.ends)
        _log.warning(
            "%s of %d supervised turns end without a token that ends generation (%s): from "
            "them a student does not learn to stop; check --chat_template",
            "all" if report.unended == report.turns else report.unended, report.turns,
            ends or "none",
        )  # fmt: skip
    if settings.system_prompt is not None and not report.given_system:
        _log.warning(
            "%s: --corpus.system_prompt has no effect: each chat has a system message", name
        )
    if report.documents and intake.add_eos and intake.ends.eos is None:
        _log.warning(
            "%s: --corpus.add_eos has no effect: the tokenizer has no EOS, so from documents a "
            "student does not learn to stop", name,
        )  # fmt: skip


def _percent_cut(counts: CorpusCounts) -> float:
    return 100 * counts.truncated_tokens / (counts.tokens + counts.truncated_tokens)


def _losses(counts: CorpusCounts, settings: CorpusSettings) -> str:
    return (
        f"{counts.dropped_no_labels} without a supervised token, "
        f"{counts.dropped_overlong} longer than {settings.longest} tokens"
    )
