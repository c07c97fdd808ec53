"""Reports go to JSON and back unchanged, and what does not fit is named."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from pydantic_core import PydanticSerializationError

from pipeline.amounts import bytes_per_token
from pipeline.errors import ConfigError
from pipeline.report import CacheFacts, Difference, Measure, Report, Row, TokenView
from tests.unit.report.sample import sample_report


def test_a_full_report_makes_the_round_trip_through_text() -> None:
    report = sample_report(num_steps=20)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert Report.from_json(json.loads(text)) == report


def test_an_empty_report_makes_the_round_trip() -> None:
    report = Report(title="nothing yet", rows=())
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_non_finite_numbers_survive_as_valid_json() -> None:
    row = Row("x", "distilled", {"kl": Measure(math.inf, math.nan)})
    data = json.dumps(Report("t", (row,)).to_json(), allow_nan=False)
    measure = Report.from_json(json.loads(data)).rows[0].metrics["kl"]
    assert measure.value == math.inf
    assert measure.standard_error is not None
    assert math.isnan(measure.standard_error)


def test_a_number_that_is_none_of_json_is_a_mistake_of_ours_and_raises() -> None:
    row = Row("x", "distilled", {"kl": Measure(0.5)}, num_parameters=np.int64(3))
    with pytest.raises(PydanticSerializationError):
        Report("t", (row,)).to_json()


def _without_title(data: dict[str, Any]) -> None:
    del data["title"]


def _unknown_field(data: dict[str, Any]) -> None:
    data["rows"][0]["colour"] = "red"


def _wrong_kind(data: dict[str, Any]) -> None:
    data["rows"][1]["kind"] = "teached"


def _text_for_number(data: dict[str, Any]) -> None:
    data["rows"][0]["metrics"]["kl_bucketed"]["value"] = "much"


def _pair_of_three(data: dict[str, Any]) -> None:
    data["curves"][0]["points"][0] = [1, 2.0, 3.0]


def _list_for_row(data: dict[str, Any]) -> None:
    data["rows"][0] = ["x"]


def _newer_format(data: dict[str, Any]) -> None:
    data["format"] = 2


def _true_for_integer(data: dict[str, Any]) -> None:
    data["cache"]["samples"] = True


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_title, r"report\.title: missing"),
        (_unknown_field, r"report\.rows\[0\]\.colour: unknown, with 'red'"),
        (_wrong_kind, r"report\.rows\[1\]\.kind: found 'teached'; expected 'before', 'control', "),
        (_text_for_number, r"\.rows\[0\]\.metrics\.kl_bucketed\.value: found 'much'.*a number"),
        (_pair_of_three, r"report\.curves\[0\]\.points\[0\]: found \[1, 2\.0, 3\.0\]; expected"),
        (_list_for_row, r"report\.rows\[0\]: found \['x'\]; expected a "),
        (_newer_format, "format 2; expected format 1"),
        (_true_for_integer, r"report\.cache\.samples: found True; expected an integer"),
    ],
)
def test_what_does_not_fit_is_named_by_its_place(spoil: Any, message: str) -> None:
    data = sample_report(num_steps=3).to_json()
    spoil(data)
    with pytest.raises(ConfigError, match=message):
        Report.from_json(data)


@pytest.mark.parametrize(
    ("value", "error", "distance", "clear"),
    [
        (-0.4, 0.1, 4.0, True),
        (0.3, 0.1, 3.0, False),
        (0.5, None, None, False),
        (0.5, math.nan, None, False),
        (0.5, 0.0, math.inf, True),
        (0.0, 0.0, 0.0, False),
    ],
)
def test_clear_means_more_than_three_standard_errors(
    value: float, error: float | None, distance: float | None, clear: bool
) -> None:
    difference = Difference("a", "b", "kl", value, error)
    if distance is None:
        assert difference.standard_errors is None
    else:
        assert difference.standard_errors == pytest.approx(distance)
    assert difference.clear is clear


def test_the_price_of_a_target_is_computed() -> None:
    cache = CacheFacts("t", "r", "c", 1, 10, 4, 100, "s", "i")
    assert bytes_per_token(cache.size_bytes, cache.loss_tokens) == 25.0
    assert bytes_per_token(cache.size_bytes, 0) == 0.0
    assert TokenView("x").teacher_top == ()
