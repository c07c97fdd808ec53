"""The page: well-formed, alone in the world, deaf to what texts want it to do."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from pipeline.report import (
    Command,
    Curve,
    Generation,
    Measure,
    Passage,
    Report,
    Row,
    Speed,
    TokenView,
)
from pipeline.report.html.page import HEAT_STEPS_NATS, render_page
from tests.unit.report.sample import sample_report

_VOID = {"meta", "br", "hr", "img", "input", "link"}
_EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}</style>"


class _Page(HTMLParser):
    """Collects the elements and checks that every one is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"{tag} closed but never opened"
        opened = self._open.pop()
        assert opened == tag, f"{opened} closed as {tag}"

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def html() -> str:
    return render_page(sample_report(num_steps=300))


@pytest.fixture(scope="module")
def page(html: str) -> _Page:
    return _Page(html)


def _evil_report() -> Report:
    row = Row(_EVIL, "distilled", {"kl": Measure(0.5, 0.1)}, detail=_EVIL)
    top = ((_EVIL, 0.5), ("\u202egnp", 0.25))
    sample = sample_report(num_steps=3)
    assert sample.cache is not None
    cache = replace(
        sample.cache,
        teacher=_EVIL,
        teacher_revision=_EVIL,
        corpus=_EVIL,
        scheme=_EVIL,
        identity=_EVIL,
        shards=(replace(sample.cache.shards[0], name=_EVIL, split=_EVIL),),
    )
    return Report(
        title=_EVIL,
        rows=(row,),
        curves=(
            Curve(_EVIL, ((0, 1.0), (1, 2.0)), _EVIL, unit=_EVIL),
            Curve(_EVIL, ((0, 1.0), (1, 2.0)), _EVIL, unit=_EVIL),
        ),
        cache=cache,
        passages=(Passage(_EVIL, (TokenView(_EVIL, 0.5, top, top), TokenView("\ud83d", 1.0))),),
        generations=(Generation(_EVIL, {_EVIL: _EVIL + "\0\x1b[31m\u202e"}),),
        settings={_EVIL: _EVIL},
        environment={_EVIL: {_EVIL: [_EVIL]}},
        commands=(Command(_EVIL, _EVIL),),
        notes=(_EVIL,),
        summary=_EVIL,
    )


def test_it_is_well_formed_and_every_id_is_there_once(page: _Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in page.named("a"):
        assert (attributes["href"] or "").removeprefix("#") in ids


def test_it_loads_nothing_and_runs_nothing(html: str, page: _Page) -> None:
    assert not re.search(r"https?://|@import|url\(", html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {name for name in names if name.startswith("on")} | (names & {"src", "srcset"})
    policy = [m for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert (policy[0]["content"] or "").startswith("default-src 'none'")


def test_addresses_in_texts_stay_texts() -> None:
    report = replace(sample_report(num_steps=3), notes=("see https://example.org/x",))
    page = _Page(render_page(report))
    assert "see https://example.org/x" in page.text
    assert all((a["href"] or "").startswith("#") for a in page.named("a"))


def test_every_hostile_text_is_shown_and_not_obeyed() -> None:
    html = render_page(_evil_report())
    page = _Page(html)
    assert "<script" not in html
    assert "<img" not in html
    assert "49" not in re.sub(r"\d+\.\d+|[A-Za-z0-9]{6,}", "", page.text)
    assert page.text.count("<script>alert(1)</script>") >= 20
    for char in "\0\x1b\u202e\ud83d":
        assert char not in html
    assert "⟨U+202E⟩gnp" in page.text
    assert "⟨U+D83D⟩" in page.text
    html.encode("utf-8")


def test_every_chart_can_be_read_aloud(page: _Page) -> None:
    charts = page.named("svg")
    assert len(charts) == 11
    ids = {attributes.get("id") for _, attributes in page.elements}
    for attributes in charts:
        assert attributes["role"] == "img"
        assert set((attributes["aria-labelledby"] or "").split()) <= ids
    assert len(page.named("desc")) == len(charts)


def test_tables_name_their_rows_and_columns(page: _Page) -> None:
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.named("th"))
    assert page.named("html")[0]["lang"] == "en"


def test_dark_phone_print_and_reduced_motion_are_thought_of(html: str, page: _Page) -> None:
    assert "@media (prefers-color-scheme: dark)" in html
    assert "@media (max-width: 760px)" in html
    assert "@media print" in html
    assert "prefers-reduced-motion" in html
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named(
        "meta"
    )


def test_the_answer_is_on_top_and_noise_is_called_noise(html: str) -> None:
    (head,) = re.findall(r"<h1>(.*?)</h1>", html)
    assert head.startswith("The distilled student is 0.313 nats closer to the teacher")
    badges = re.findall(r'class="badge (\w+)">([^<]+)<', html)
    assert badges.count(("clear", "clear")) == 4
    assert badges.count(("noise", "within noise")) == 1


def test_a_token_can_be_reached_by_keyboard_and_read_as_a_table(page: _Page) -> None:
    tokens = [a for a in page.named("span") if (a.get("class") or "").startswith("tok k")]
    measured = [a for a in tokens if "tabindex" in a]
    tips = [a for a in page.named("span") if a.get("class") == "tip"]
    assert len(measured) == len(tips) > 100
    assert "·molecules" in page.text


def test_colour_steps_are_fixed() -> None:
    values = [None, 0.0, *HEAT_STEPS_NATS]
    tokens = tuple(TokenView(f"w{i}", value) for i, value in enumerate(values))
    html = render_page(Report("t", (), passages=(Passage("p", tokens),)))
    text = html[html.index('class="words"') :]
    assert re.findall(r'class="tok (k\d(?: given)?)"', text) == [
        "k0 given", "k0", "k1", "k2", "k3", "k4", "k5",
    ]  # fmt: skip


def test_an_empty_report_has_no_empty_sections() -> None:
    page = _Page(render_page(Report("nothing yet", ())))
    assert not page.named("section")
    assert not page.named("a")[1:]


def test_the_same_report_gives_the_same_page(html: str) -> None:
    assert render_page(sample_report(num_steps=300)) == html


def test_the_page_stays_small() -> None:
    long = sample_report(num_steps=50_000)
    assert len(render_page(replace(long, passages=())).encode()) < 100_000


def test_columns_of_a_gpu_are_shown_where_there_was_one() -> None:
    on_cpu = Speed("on a CPU", 10, 200, 100.0, 0.0, 2.0, tokens_per_s_per_device=100.0, rank=1)
    on_gpus = Speed(
        "on GPUs", 10, 200, 8000.0, 0.0, 2.0, tokens_per_s_per_device=1000.0, mfu=0.412,
        device_peak_gib=70.5, skipped_updates=3,
    )  # fmt: skip
    shown = ("MFU", "41.2 %", "Peak GPU memory", "70.50 GiB", "Skipped updates", "A device")
    for speeds, seen in (((on_cpu,), False), ((on_cpu, on_gpus), True)):
        page = render_page(replace(sample_report(), speeds=speeds))
        table = "<table " + page[page.index('class="small speeds"') :].split("</table>")[0]
        assert [word for word in shown if (word in _Page(f"{table}</table>").text) != seen] == []
