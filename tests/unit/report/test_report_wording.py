"""The sentences say what the numbers say: better, worse, or not to be told apart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pipeline.report import Difference, Measure, Report, Row, difference_sentence, headline
from pipeline.report.text.metrics import METRICS, kl_note, metric_decimals
from pipeline.report.text.numbers import format_count, format_measure
from tests.unit.report.sample import sample_report

ROWS = sample_report(num_steps=3).rows


@pytest.mark.parametrize(
    ("difference", "sentence"),
    [
        (
            Difference("distilled", "control", "kl", -0.3127, 0.0061),
            "The distilled student is 0.313 nats closer to the teacher than the cross-entropy "
            "control (51 standard errors, paired over the same tokens).",
        ),
        (
            Difference("distilled", "control", "kl", 0.3127, 0.0061, paired=False),
            "The distilled student is 0.313 nats further from the teacher than the cross-entropy "
            "control (51 standard errors).",
        ),
        (
            Difference("distilled", "control", "kl_bucketed", -0.3127, 0.0061),
            "The distilled student is 0.313 nats closer to the teacher (bucketed KL) than the "
            "cross-entropy control (51 standard errors, paired over the same tokens).",
        ),
        (
            Difference("distilled", "control", "kl", -0.012, 0.01),
            "The distilled student and the cross-entropy control cannot be told apart in KL to "
            "the teacher: they differ by 0.01 nats, which is within noise (1.2 "
            "standard errors; more than 3 would be clear).",
        ),
        (
            Difference("distilled", "control", "kl_bucketed", -0.012, 0.01),
            "The distilled student and the cross-entropy control cannot be told apart in bucketed "
            "KL: they differ by 0.01 nats, which is within noise (1.2 "
            "standard errors; more than 3 would be clear).",
        ),
        (
            Difference("distilled", "control", "kl", -0.00018, 0.00002),
            "The distilled student is 0.00018 nats closer to the teacher than the cross-entropy "
            "control (9.0 standard errors, paired over the same tokens).",
        ),
        (
            Difference("distilled", "control", "cross_entropy", 0.00028, 0.0001),
            "The distilled student and the cross-entropy control cannot be told apart in "
            "cross-entropy: they differ by 0.0003 nats, which is within noise (2.8 standard "
            "errors; more than 3 would be clear).",
        ),
        (
            Difference("distilled", "control", "kl", 0.00004),
            "The distilled student and the cross-entropy control differ by 0.00004 nats in KL to "
            "the teacher; no standard error was measured, so this may be noise.",
        ),
        (
            Difference("distilled", "control", "top1_agreement", -0.05, 0.005),
            "The distilled student has a top-1 agreement 5.0 percentage points lower than the "
            "cross-entropy control, which is worse (10 standard errors, paired over the same "
            "tokens).",
        ),
        (
            Difference("distilled", "control", "cross_entropy", -0.2),
            "The distilled student and the cross-entropy control differ by 0.200 nats in "
            "cross-entropy; no standard error was measured, so this may be noise.",
        ),
        (
            Difference("run 7", "run 8", "kl", -0.2, 0.0),
            "Run 7 is 0.200 nats closer to the teacher than run 8 (without any measured error, "
            "paired over the same tokens).",
        ),
    ],
)
def test_a_difference_in_words(difference: Difference, sentence: str) -> None:
    assert difference_sentence(difference, ROWS) == sentence


def test_in_a_sweep_rows_keep_their_own_names() -> None:
    rows = (Row("T=1", "distilled", {}), Row("T=2", "distilled", {}), Row("c", "control", {}))
    sentence = difference_sentence(Difference("T=1", "T=2", "kl", -0.2, 0.01), rows)
    assert sentence.startswith("T=1 is 0.20 nats closer to the teacher than T=2")


def test_the_headline_prefers_the_control_and_the_paired_difference() -> None:
    report = sample_report(num_steps=3)
    assert headline(report) == difference_sentence(report.differences[0], report.rows)
    assert headline(replace(report, summary="Stated.")) == "Stated."


def test_without_a_measured_difference_the_headline_takes_the_rows() -> None:
    report = replace(sample_report(num_steps=3), differences=())
    assert headline(report) == (
        "The distilled student is 0.313 nats closer to the teacher (bucketed KL) than the "
        "cross-entropy control (32 standard errors)."
    )


def test_without_a_control_the_headline_compares_with_the_start() -> None:
    report = sample_report(num_steps=3)
    rows = tuple(row for row in report.rows if row.kind != "control")
    differences = tuple(d for d in report.differences if d.b != "control")
    said = headline(replace(report, rows=rows, differences=differences))
    assert "than the student before training (90 standard errors, paired" in said


def test_a_report_of_one_model_claims_nothing() -> None:
    assert headline(Report("t", ())) == "This report compares no two models."
    only = Row("d", "distilled", {"kl": Measure(0.1)})
    assert headline(Report("t", (only,))) == "This report compares no two models."


@pytest.mark.parametrize(
    ("measure", "shown"),
    [
        (None, ("—", "")),
        (Measure(math.nan), ("—", "")),
        (Measure(0.5, math.nan), ("50.0", "")),
        (Measure(0.51234, 0.0031), ("51.2", "± 0.3")),
    ],
)
def test_measures_as_shown(measure: Measure | None, shown: tuple[str, str]) -> None:
    assert format_measure(measure, METRICS["top1_agreement"]) == shown


def test_counts() -> None:
    assert format_count(18_432) == "18\u202f432"
    assert format_count(134_515_008) == "135 million"


def test_a_table_shows_the_digits_that_the_error_leaves() -> None:
    rows = (Row("a", "distilled", {"kl": Measure(0.00042, 0.000021)}),)
    decimals = metric_decimals(METRICS["kl"], rows)
    shown = format_measure(rows[0].metrics["kl"], METRICS["kl"], decimals=decimals)
    assert shown == ("0.000420", "± 0.000021")


def test_a_lower_bound_is_called_one_and_an_unbiased_estimate_is_not() -> None:
    assert "a lower bound of the KL" in kl_note(bucketed=True)
    assert "unbiased" in kl_note(bucketed=False)
    assert not METRICS["kl"].note
