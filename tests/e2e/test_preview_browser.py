"""The preview's page in a real browser: light and dark, any width, nothing asked of the network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.corpus.intake import TeacherTokens
from pipeline.corpus.preview.choice import choose_rows
from pipeline.corpus.preview.collect import preview_corpus
from pipeline.corpus.preview.page import render_html
from pipeline.corpus.reading import open_reading
from pipeline.corpus.samples import SampleIntake
from pipeline.corpus.settings import CorpusSettings
from tests.e2e.test_report_browser import _DARK, _chromium, _contrast, _visit
from tests.tiny import make_tokenizer, write_corpus

pytestmark = pytest.mark.browser

_PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="f" src="preview.html" style="border:0;width:WIDTHpx;height:800px"></iframe>
<pre id="facts"></pre><script>
document.getElementById("f").addEventListener("load", () => {
  const frame = document.getElementById("f"), page = frame.contentDocument;
  const style = (element) => frame.contentWindow.getComputedStyle(element);
  const root = page.documentElement;
  const wide = [...page.querySelectorAll("body *")].filter(
    (e) => e.getBoundingClientRect().right > root.clientWidth + 1);
  const mask = page.querySelector(".text .m");
  const plain = page.querySelector(".text .t:not(.m):not(.x)");
  document.getElementById("facts").textContent = JSON.stringify({
    scripts: page.scripts.length,
    injected: String(frame.contentWindow.injected),
    tooWide: wide.slice(0, 5).map((e) => e.tagName + "." + e.className),
    scrollWidth: root.scrollWidth, clientWidth: root.clientWidth,
    background: style(page.body).backgroundColor, color: style(page.body).color,
    muted: style(page.querySelector(".muted")).color,
    mask: [style(mask).color, style(mask).backgroundColor],
    plain: style(plain).backgroundColor,
    panel: style(page.querySelector("article")).backgroundColor,
    special: style(page.querySelector(".text .x:not(.m)")).color,
    warning: style(page.querySelector(".findings strong")).color,
    bars: [...page.querySelectorAll(".bar span")].map((e) => e.getBoundingClientRect().width),
    supervised: [...page.querySelectorAll("article .m")].map((e) => e.textContent).join(""),
  });
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page with endless words, markup in its texts, and rows that cannot be used."""
    folder = tmp_path_factory.mktemp("page")
    answers = ["plain answer", "x" * 900, "<script>injected = 1</script> <b>bold</b>", "a\u202eb"]
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]}
        for text in answers
    ]
    rows.append({"messages": "<img src=x onerror='injected = 1'>" + "y" * 300})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = CorpusSettings(dataset_name=str(file), max_length=60)
    tokenizer = make_tokenizer(write_corpus(folder / "corpus"))
    intake = SampleIntake(
        chosen, tokenizer, open_reading(chosen), 42, TeacherTokens(), add_eos=True
    )
    found = preview_corpus(intake, choose_rows("0:5"), sample_rows=10)
    (folder / "preview.html").write_text(render_html(found), encoding="utf-8")
    return folder / "preview.html"


def _facts(page: Path, tmp_path: Path, *, width: int, dark: bool) -> dict[str, Any]:
    (page.parent / "probe.html").write_text(_PROBE.replace("WIDTH", str(width)))
    dom = _chromium(
        tmp_path, *([_DARK] if dark else []), "--window-size=1300,900", "--dump-dom",
        (page.parent / "probe.html").as_uri(),
    )  # fmt: skip
    (text,) = re.findall(r'<pre id="facts">(.*?)</pre>', dom, re.DOTALL)
    facts: dict[str, Any] = json.loads(
        text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    )
    return facts


@pytest.mark.parametrize("width", [320, 1200])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    facts = _facts(page, tmp_path, width=width, dark=dark)
    assert facts["tooWide"] == []
    assert facts["scrollWidth"] <= facts["clientWidth"]
    assert facts["scripts"] == 0
    assert facts["injected"] == "undefined"
    assert "<script>injected = 1</script>" in facts["supervised"]
    assert "⟨U+202E⟩" in facts["supervised"]
    assert _contrast(facts["color"], facts["background"]) > 7
    for name in ("muted", "warning"):
        assert _contrast(facts[name], facts["background"]) > 4.5, name
    assert _contrast(*facts["mask"]) > 4.5
    assert _contrast(facts["special"], facts["panel"]) > 4.5
    assert facts["mask"][1] != facts["plain"]
    assert max(facts["bars"]) > 30
    assert (_contrast("rgb(0,0,0)", facts["background"]) < 3) == dark


def test_nothing_is_asked_of_the_network(page: Path, tmp_path: Path) -> None:
    console, asked = _visit(page, tmp_path)
    assert console == []
    assert asked == set()
