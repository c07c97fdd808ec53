"""The report in a real browser: nothing runs off the screen, both colour schemes, tips by key."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.report import Generation, Passage, Report, TokenView, write_report
from tests.unit.report.sample import sample_report, sample_sweep_report

pytestmark = pytest.mark.browser

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--allow-file-access-from-files",
    "--virtual-time-budget=5000",
)
_DARK = "--blink-settings=preferredColorScheme=0"

# The page forbids scripts, its own included, so that a page around it does the measuring.
_PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="f" src="report.html" style="border:0;width:WIDTHpx;height:800px"></iframe>
<pre id="facts"></pre><script>
document.getElementById("f").addEventListener("load", () => {
  const frame = document.getElementById("f"), page = frame.contentDocument;
  const style = (element) => frame.contentWindow.getComputedStyle(element);
  const root = page.documentElement;
  const inScroller = (e) => e.closest(".scroll, pre, .tip, .skip, .guess");
  const wide = [...page.querySelectorAll("body *")].filter(
    (e) => !inScroller(e) && e.getBoundingClientRect().right > root.clientWidth + 1);
  const token = page.querySelector(".text .tok[tabindex]");
  const facts = {
    scripts: page.scripts.length,
    pictures: [...page.querySelectorAll("img, svg")].map((e) => {
      const box = e.getBoundingClientRect();
      return e.tagName === "IMG" ? e.naturalWidth > 0 : box.width > 0 && box.height > 0
        && e.querySelectorAll("circle, path, polyline").length > 0 && !!e.querySelector("title");
    }),
    injected: String(frame.contentWindow.injected),
    scrollWidth: root.scrollWidth,
    clientWidth: root.clientWidth,
    tooWide: wide.slice(0, 5).map((e) => e.tagName + "." + e.className),
    background: style(page.body).backgroundColor,
    color: style(page.body).color,
    muted: style(page.querySelector("footer")).color,
    smallest: Math.min(...[...page.querySelectorAll("svg text")].map(
      (e) => e.getBoundingClientRect().height)),
  };
  facts.badges = [...page.querySelectorAll(".badge, .dot")].map(
    (e) => [style(e).color, style(e).backgroundColor]);
  if (token) {
    const tip = token.querySelector(".tip");
    facts.tipBefore = style(tip).display;
    token.focus();
    facts.tipAfter = style(tip).display;
    const box = tip.getBoundingClientRect();
    facts.tipInside = box.left >= 0 && box.right <= root.clientWidth;
    facts.strongest = style(page.querySelector(".scale .k5")).backgroundColor;
  }
  document.getElementById("facts").textContent = JSON.stringify(facts);
});
</script>"""


_BROWSERS_OWN = ("google.com", "googleapis.com", "gvt1.com", "googleusercontent.com")
"""Chromium asks these for updates and the time whatever page it shows."""


def _visit(page: Path, tmp_path: Path) -> tuple[list[str], set[str]]:
    """Return what the page wrote to the console, and every address that was asked for."""
    log = tmp_path / "net.json"
    result = subprocess.run(
        [_binary(), *_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
         f"--log-net-log={log}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in result.stderr.splitlines() if ":CONSOLE:" in line]
    asked = re.findall(r'"url":"((?:https?|wss?|ftp)://([^/:"]+)[^"]*)"', log.read_text())
    return console, {url for url, host in asked if not host.endswith(_BROWSERS_OWN)}


def _binary() -> str:
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    assert binary, "no chromium found; install it with: apt-get install chromium"
    return binary


def _chromium(tmp_path: Path, *arguments: str) -> str:
    command = [_binary(), *_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return result.stdout


def _facts(report: Report, tmp_path: Path, *, width: int, dark: bool = False) -> dict[str, Any]:
    write_report(report, tmp_path)
    probe = tmp_path / "probe.html"
    probe.write_text(_PROBE.replace("WIDTH", str(width)), encoding="utf-8")
    flags = [_DARK] if dark else []
    dom = _chromium(tmp_path, *flags, "--window-size=1300,900", "--dump-dom", probe.as_uri())
    (text,) = re.findall(r'<pre id="facts">(.*?)</pre>', dom, re.DOTALL)
    facts: dict[str, Any] = json.loads(text.replace("&lt;", "<").replace("&gt;", ">"))
    return facts


def _long_report() -> Report:
    endless = "x" * 400
    report = sample_report(num_steps=40)
    rows = tuple(replace(row, name=row.name + " " + endless[:60]) for row in report.rows)
    token = TokenView(endless, 0.4, ((endless, 0.6),), ((endless, 0.2),))
    return replace(
        report,
        rows=rows,
        title=endless,
        notes=(endless,),
        passages=(*report.passages, Passage(endless, (token,))),
        generations=(Generation(endless, {endless: endless, "b": endless}),),
        settings={endless: endless},
        environment={endless: endless},
    )


def _luminance(color: str) -> float:
    channels = [float(part) / 255 for part in re.findall(r"[\d.]+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(a: str, b: str) -> float:
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _over(layer: str, ground: str) -> str:
    *color, alpha = (float(part) for part in re.findall(r"[\d.]+", layer))
    below = [float(part) for part in re.findall(r"[\d.]+", ground)[:3]]
    mixed = [alpha * c + (1 - alpha) * g for c, g in zip(color, below, strict=True)]
    return "rgb({}, {}, {})".format(*mixed)


@pytest.mark.parametrize("width", [320, 390, 800, 1200])
@pytest.mark.parametrize("long_texts", [False, True])
def test_nothing_runs_off_the_screen(tmp_path: Path, width: int, long_texts: bool) -> None:
    report = _long_report() if long_texts else sample_report(num_steps=40)
    facts = _facts(report, tmp_path, width=width)
    assert facts["tooWide"] == []
    assert facts["scrollWidth"] <= facts["clientWidth"]
    assert facts["smallest"] >= 10


@pytest.mark.parametrize("dark", [False, True])
def test_both_colour_schemes_can_be_read(tmp_path: Path, dark: bool) -> None:
    facts = _facts(sample_report(num_steps=40), tmp_path, width=1200, dark=dark)
    assert (_luminance(facts["background"]) < 0.1) is dark
    assert _contrast(facts["color"], facts["background"]) >= 7
    assert _contrast(facts["muted"], facts["background"]) >= 4.5
    assert _contrast(facts["color"], _over(facts["strongest"], facts["background"])) >= 4.5


@pytest.mark.parametrize("width", [390, 1200])
def test_a_token_opens_its_tip_by_keyboard_and_the_tip_is_on_the_screen(
    tmp_path: Path, width: int
) -> None:
    facts = _facts(sample_report(num_steps=40), tmp_path, width=width)
    assert (facts["tipBefore"], facts["tipAfter"]) == ("none", "block")
    assert facts["tipInside"] is True


def test_hostile_texts_do_nothing(tmp_path: Path) -> None:
    evil = "<script>window.injected = 1</script><img src=x onerror='window.injected = 2'>"
    report = replace(
        sample_report(num_steps=3),
        title=evil,
        summary=evil,
        passages=(Passage(evil, (TokenView(evil, 0.4, ((evil, 0.5),), ()),)),),
        generations=(Generation(evil, {evil: evil}),),
    )
    facts = _facts(report, tmp_path, width=800)
    assert (facts["scripts"], facts["injected"]) == (0, "undefined")


REPORTS = {"run": sample_report, "sweep": sample_sweep_report}


@pytest.mark.parametrize("kind", REPORTS)
def test_no_console_message_and_no_request_but_the_page(tmp_path: Path, kind: str) -> None:
    page = write_report(REPORTS[kind](num_steps=40), tmp_path / "report")
    assert _visit(page, tmp_path) == ([], set())


def test_the_browser_would_tell_of_both(tmp_path: Path) -> None:
    page = tmp_path / "canary.html"
    page.write_text("<img src='http://canary.invalid/x.png'><script>console.error('boom')</script>")
    console, asked = _visit(page, tmp_path)
    assert any("boom" in line for line in console)
    assert asked == {"http://canary.invalid/x.png"}


@pytest.mark.parametrize(("kind", "charts"), [("run", 5 + 4), ("sweep", 3 + 5 + 3)])
def test_every_picture_is_there(tmp_path: Path, kind: str, charts: int) -> None:
    facts = _facts(REPORTS[kind](num_steps=40), tmp_path, width=1200)
    assert facts["pictures"] == [True] * len(facts["pictures"])
    assert len(facts["pictures"]) >= charts


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_sweep_fits_and_can_be_read(tmp_path: Path, width: int, dark: bool) -> None:
    facts = _facts(sample_sweep_report(num_steps=40), tmp_path, width=width, dark=dark)
    assert facts["tooWide"] == []
    assert facts["scrollWidth"] <= facts["clientWidth"]
    assert facts["smallest"] >= 10
    for text, ground in facts["badges"]:
        assert _contrast(text, ground) >= 4.5, (text, ground)


def test_a_picture_of_the_page_is_not_blank(tmp_path: Path) -> None:
    page = write_report(sample_report(num_steps=40), tmp_path)
    picture = tmp_path / "page.png"
    _chromium(tmp_path, f"--screenshot={picture}", "--window-size=1200,1600", page.as_uri())
    assert picture.stat().st_size > 50_000
