"""The terminal table: aligned, honest, never wider than a terminal of 100 columns."""

from __future__ import annotations

from dataclasses import replace

from pipeline.report import Measure, Report, Row, terminal_table
from pipeline.report.text.table import WIDTH
from tests.unit.report.sample import sample_report

_EXPECTED = """\
The distilled student is 0.313 nats closer to the teacher (bucketed KL) than the cross-entropy
control (51 standard errors, paired over the same tokens).

model           bucketed KL (nats)      CE (nats)      top-1 (%)      ECE (%)      perplexity
---------------------------------------------------------------------------------------------
student before     1.2953 ± 0.0112  2.741 ± 0.014   53.12 ± 0.31  6.21 ± 0.16  15.502 ± 0.219
control            0.7238 ± 0.0084  1.982 ± 0.012   65.19 ± 0.31  3.88 ± 0.16   7.260 ± 0.089
distilled          0.4111 ± 0.0052  1.978 ± 0.012   71.37 ± 0.31  2.47 ± 0.16   7.230 ± 0.086
teacher            0.0000 ± 0.0000  1.712 ± 0.011  100.00 ± 0.00  1.94 ± 0.16   5.541 ± 0.063
Bucketed KL: over the cached top-k and one entry for all other tokens, a lower bound of the KL.
"""


def test_the_whole_table_as_it_is_printed() -> None:
    report = sample_report(num_steps=3)
    assert terminal_table(replace(report, differences=report.differences[:1])) == _EXPECTED


def test_the_answer_is_not_said_twice_and_every_other_difference_is() -> None:
    text = terminal_table(sample_report(num_steps=3)).replace("\n  ", " ").replace("\n", " ")
    assert text.count("0.313 nats closer") == 1
    assert text.count("- The ") == 4
    assert "within noise" in text


def test_no_line_is_too_wide_and_what_was_left_out_is_named() -> None:
    metrics = {
        name: Measure(123456.789, 0.00012)
        for name in ("kl", "cross_entropy", "perplexity", "top1_agreement", "ece")
    }
    rows = (Row("a name that goes on and on and on", "before", metrics),)
    lines = terminal_table(Report("t", rows)).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "a name that goes on a…" in "\n".join(lines)
    assert lines[-1] == "(not shown for want of room: Calibration error)"


def test_missing_measures_and_missing_errors_keep_the_columns() -> None:
    rows = (
        Row("one", "before", {"kl": Measure(1.0), "ece": Measure(0.5)}),
        Row("two", "distilled", {"kl": Measure(0.5, 0.01)}),
    )
    lines = terminal_table(Report("t", rows)).splitlines()
    table = [line for line in lines if line.startswith(("one", "two"))]
    assert table == ["one    1.000            50.00", "two    0.500 ± 0.010        —"]
    assert lines[0].startswith("The distilled student and the student before training differ")


def test_an_empty_report_still_prints() -> None:
    assert terminal_table(Report("t", ())) == "This report compares no two models.\n"
