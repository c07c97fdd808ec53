"""Axes, thinning and the SVG they become."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report import Curve, Measure, Row
from pipeline.report.charts.dots import rows_scene
from pipeline.report.charts.lines import averaged_over, curves_scene
from pipeline.report.charts.png import png
from pipeline.report.charts.scale import log_axis, nice_axis, thin, tick_label
from pipeline.report.charts.scene import Line, Mark, Scene, mark, outline
from pipeline.report.charts.styles import STYLES
from pipeline.report.charts.svg import svg
from pipeline.report.text.metrics import METRICS

_NUMBERS = st.lists(st.floats(-1e9, 1e9, allow_subnormal=False), min_size=1, max_size=20)


@given(values=_NUMBERS, from_zero=st.booleans())
def test_every_value_lies_on_the_axis(values: list[float], from_zero: bool) -> None:
    axis = nice_axis(values, start=10.0, end=110.0, from_zero=from_zero)
    slack = (axis.high - axis.low) * 1e-6
    assert axis.low - slack <= min(values)
    assert max(values) <= axis.high + slack
    assert 2 <= len(axis.ticks) <= 8
    for value in values:
        assert 9.9 <= axis.at(value) <= 110.1
    if from_zero:
        assert axis.low - slack <= 0.0 <= axis.high + slack


@given(values=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_every_value_lies_on_the_logarithmic_axis(values: list[float]) -> None:
    if max(values) / min(values) <= 20.0:
        values = [*values, min(values) * 25.0]
    axis = log_axis(values, start=0.0, end=1.0)
    assert len(axis.ticks) >= 2
    for value in values:
        assert -1e-6 <= axis.at(value) <= 1 + 1e-6


def test_ticks_are_round() -> None:
    axis = nice_axis([0.0, 1.2953], start=0.0, end=1.0, from_zero=True)
    assert [tick_label(tick) for tick in axis.ticks] == ["0", "0.5", "1", "1.5"]


@pytest.mark.parametrize(
    ("value", "label"),
    [(0.0, "0"), (1e-17, "0"), (0.05, "0.05"), (1200, "1200"), (20_000, "20k"), (3e6, "3M")],
)
def test_tick_labels(value: float, label: str) -> None:
    assert tick_label(value) == label


@given(st.lists(st.floats(-10, 10), max_size=2000))
def test_thinning_keeps_the_mean_and_the_order(values: list[float]) -> None:
    points, size = thin(list(enumerate(values)), most=50)
    assert len(points) <= 50
    assert [step for step, _ in points] == sorted(step for step, _ in points)
    if size == 1:
        assert points == [(float(step), value) for step, value in enumerate(values)]


def test_a_step_without_a_finite_value_is_left_out() -> None:
    assert thin([(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)])[0] == [(0.0, 1.0), (3.0, 2.0)]


def _parsed(scene: Scene) -> ElementTree.Element:
    root = ElementTree.fromstring(svg(scene, identity="x"))
    labelled = (root.get("aria-labelledby") or "").split()
    assert [child.tag for child in root[:2]] == ["title", "desc"]
    assert [child.get("id") for child in root[:2]] == labelled
    return root


def test_a_dot_chart_has_a_shape_a_role_and_whiskers_only_where_there_is_an_error() -> None:
    rows = (
        Row("a<b", "before", {"kl": Measure(1.0, 0.1)}),
        Row("c", "control", {"kl": Measure(0.5)}),
        Row("d", "distilled", {"kl": Measure(math.nan)}),
        Row("t", "teacher", {}),
    )
    root = _parsed(rows_scene(rows, METRICS["kl"]))
    classes = [element.get("class") for element in root.iter() if element.get("class")]
    assert [c for c in classes if c and "whisker" in c] == ["whisker before"]
    marks = [c for c in classes if c and c.startswith("mark")]
    assert marks == ["mark before open", "mark control"]
    assert root[1].text == "a<b: 1.00 ± 0.10; c: 0.50; d: —; t: —"


def test_a_line_chart_tells_start_and_end_and_says_when_it_is_logarithmic() -> None:
    curve = Curve("Held-out KL", ((0, 5.0), (50, 0.5), (100, 0.1)), "run", unit="nats")
    root = _parsed(curves_scene([curve]))
    assert root[0].text == "Held-out KL in nats by training step, logarithmic scale"
    assert root[1].text == "run: 5 at step 0, 0.1 at step 100"
    (line,) = (element for element in root.iter("path") if element.get("class") == "line distilled")
    assert len((line.get("d") or "").split()) == 3


def test_a_line_chart_over_tokens_says_so() -> None:
    curve = Curve("held-out KL", ((0, 3.0), (20_000, 2.0)), "run", unit="nats", over="tokens")
    root = _parsed(curves_scene([curve]))
    assert root[0].text == "held-out KL in nats by tokens trained on"
    assert root[1].text == "run: 3 at 0 tokens, 2 at 20000 tokens"
    assert "tokens" in [element.text for element in root.iter("text")]


@pytest.mark.parametrize("points", [(), ((5, 1.0),), ((5, math.nan),), ((5, 0.0), (6, 0.0))])
def test_little_or_nothing_to_draw_is_still_a_chart(points: tuple[tuple[int, float], ...]) -> None:
    _parsed(curves_scene([Curve("x", points)]))
    _parsed(curves_scene([Curve("x", points, group="speed")]))


def test_the_reader_is_told_how_much_was_averaged() -> None:
    assert averaged_over([Curve("x", tuple((i, 1.0) for i in range(1000)))]) == 5
    assert averaged_over([]) == 1


def test_two_kinds_of_curves_in_one_chart_are_told_apart() -> None:
    dense = Curve("training KL", tuple((step, 1.0 + step % 7) for step in range(300)), "a")
    sparse = Curve("held-out KL", ((0, 3.0), (150, 2.0), (299, 1.0)), "a")
    scene = curves_scene([sparse, dense])
    lines = [part for part in scene.parts if isinstance(part, Line) and part.kind == "line"]
    assert [line.pale for line in lines] == [True, False], "what matters more is on top"
    assert sum(isinstance(part, Mark) for part in scene.parts) == 3
    assert [(key.label, key.pale) for key in scene.legend] == [
        ("held-out KL, a", False), ("training KL, a", True),
    ]  # fmt: skip
    assert scene.heading == "held-out KL and training KL"
    alone = curves_scene([sparse])
    assert not any(isinstance(part, Mark) for part in alone.parts)


def test_every_style_is_told_apart_without_its_colour() -> None:
    ranked = [style for name, style in STYLES.items() if name.startswith("r")]
    for styles in (ranked, [STYLES[name] for name in ("before", "control", "dense", "distilled")]):
        assert len({(style.shape, style.size, style.open) for style in styles}) == len(styles)
        assert len({(style.dash, style.width) for style in styles}) == len(styles)


@pytest.mark.parametrize("style", STYLES)
def test_a_mark_reaches_as_far_as_its_size(style: str) -> None:
    found = mark(style, 10.0, 20.0)
    corners = outline(found)
    assert (corners == ()) is (found.shape == "circle")
    for x, y in corners:
        assert abs(x - 10) <= found.size
        assert abs(y - 20) <= found.size


def test_the_same_scene_gives_the_same_picture() -> None:
    scene = curves_scene([Curve("loss $x", ((0, 1.0), (1, 2.0)), "a $ b", unit="$")] * 2)
    assert png(scene).startswith(b"\x89PNG")
    assert png(scene) == png(scene)
