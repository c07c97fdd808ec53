"""`preview` shows what stage one caches: the same ids, masks and split; it writes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.corpus.split import response_id
from stages.preview import PreviewRun, preview_of
from tests.conftest import Stage, Tiny, digests
from tests.responses import cached_rows


def _run(flags: list[Any]) -> PreviewRun:
    from pipeline.config import parse_command

    argv = [str(flag) for flag in flags]
    return parse_command(PreviewRun, argv, prog="p", description="").settings


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return chats of all kinds of fates: long ones, bad ones, some without an answer."""

    def chat(question: str, answer: str) -> dict[str, Any]:
        roles = zip(("user", "assistant"), (question, answer), strict=True)
        return {"messages": [{"role": role, "content": text} for role, text in roles]}

    rows: list[dict[str, Any]] = [
        chat(f"what is {n} 🙂", "value " * (3 + 60 * (n % 7 == 3))) for n in range(40)
    ]
    rows[5], rows[9] = {"messages": 3}, chat("no answer", "")
    file = tmp_path_factory.mktemp("odd") / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_what_is_shown_is_what_is_cached(
    overlong: str, tiny: Tiny, odd: Path, stage: Stage, tmp_path: Path
) -> None:
    flags = [
        *tiny.stage_one, "--dataset_name", odd, "--max_length", "48", "--corpus.overlong", overlong,
        "--cache_dir", tmp_path / "cache",
    ]  # fmt: skip
    found = preview_of(_run(flags), rows="0:100")
    assert not (tmp_path / "cache").exists()
    stage("cache_teacher", flags).ok()
    cached = cached_rows(tmp_path / "cache")
    shown = {part.sample_id: part for row in found.rows for part in row.parts}
    assert shown.keys() == cached.keys()
    assert len(cached) > 35
    for name, row in cached.items():
        np.testing.assert_array_equal(shown[name].input_ids_L, row.input_ids_L)
        np.testing.assert_array_equal(shown[name].loss_mask_L, row.loss_mask_L)
    from pipeline.cache.io.reader import open_cache

    source = open_cache(str(tmp_path / "cache")).source("heldout")
    heldout = {
        row.sample_id
        for shard, rows in enumerate(source.shard_rows())
        for row in source.read_rows(shard, range(rows))
    }
    assert heldout
    assert heldout == {
        part.sample_id for row in found.rows for part in row.parts if row.split == "heldout"
    }
    counts = open_cache(str(tmp_path / "cache")).manifest.corpus_counts
    for name in ("truncated_tokens", "split_rows", "dropped_no_labels"):
        assert found.totals.counts.get(name, 0) == counts[name]
    assert counts["truncated_tokens" if overlong == "truncate" else "split_rows"] > 0
    assert found.totals.bad == counts["quarantined"] == 1


def test_prompts_are_those_that_are_answered(
    tiny: Tiny, odd: Path, stage: Stage, tmp_path: Path
) -> None:
    flags = [
        *tiny.stage_one, "--dataset_name", odd, "--cache_dir", tmp_path / "cache",
        "--generate.enabled", "--generate.max_new_tokens", "10", "--generate.prompt_tokens", "4",
        "--max_length", "48",
    ]  # fmt: skip
    result = stage("cache_teacher", [*flags, "--preview"]).ok()
    assert "here the teacher writes" in result.out
    assert "<|im_start|>⟩assistant" in result.out
    assert str(tmp_path / "cache") in result.out
    assert not (tmp_path / "cache").exists()
    found = preview_of(_run(flags), rows="0:100")
    stage("cache_teacher", flags).ok()
    cached = cached_rows(tmp_path / "cache")
    shown = {response_id(p.sample_id, 0): p for row in found.rows for p in row.parts}
    assert shown.keys() == cached.keys()
    for name, row in cached.items():
        prompt = shown[name].input_ids_L
        np.testing.assert_array_equal(row.input_ids_L[: prompt.size], prompt)
        assert not row.loss_mask_L[: prompt.size].any()
        assert row.loss_mask_L[prompt.size :].all()


def test_the_terminal_and_the_page(tiny: Tiny, odd: Path, stage: Stage, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "preview.html"
    flags = [
        *tiny.stage_one, "--dataset_name", odd, "--max_length", "48", "--cache_dir",
        tmp_path / "cache", "--rows", "0:2,truncated,quarantined,dropped", "--html", page,
    ]  # fmt: skip
    out = stage("preview", flags).ok().out
    assert not (tmp_path / "cache").exists()
    # No terminal: brackets show the mask, no escape sequence is written.
    assert "\x1b" not in out
    assert re.search(r"⟨<\|im_start\|>⟩assistant↵\n«value value value.*⟨<\|im_end\|>⟩»", out)
    assert re.search(r"row 3, chats.jsonl, line 4: (train|held out), \d+ tokens", out)
    assert re.search(r"✂ \d+ tokens cut off at max_length 48, \d+ of them supervised", out)
    assert re.search(r"row 5, .*quarantined: .*line 6.*the conversation is", out)
    assert "row 9, chats.jsonl, line 10: left out: no supervised token" in out
    assert "48 tokens: what is longer is cut" in out
    assert f"page {page}" in out
    text = page.read_text(encoding="utf-8")
    assert text.count("<article>") == 5
    assert 'class="t m x"' in text
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text


def test_stage_one_previews_and_stops(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    before = digests(tiny_cache)
    flags = [*tiny.stage_one, "--cache_dir", tiny_cache, "--preview"]
    out = stage("cache_teacher", flags).ok().out
    assert out.startswith(f"preview of {tiny.corpus}: nothing is loaded or written")
    assert digests(tiny_cache) == before
    # With no weights at all: only the tokenizer and the config are read.
    light = tmp_path / "light"
    light.mkdir()
    for file in tiny.teacher.iterdir():
        if file.suffix != ".safetensors":
            (light / file.name).write_bytes(file.read_bytes())
    assert stage("preview", [*flags[:-1], "--teacher_model", light]).ok().out == out.replace(
        str(tiny.teacher), str(light)
    )


def test_mistakes_of_a_preview_are_told_at_once(tiny: Tiny, stage: Stage, tmp_path: Path) -> None:
    flags = [*tiny.stage_one, "--cache_dir", tmp_path, "--dataset_name", tiny.corpus]
    assert "rows: found 'first'" in stage("preview", [*flags, "--rows", "first"]).refused(2)
    (tmp_path / "file").touch()
    message = stage("preview", [*flags, "--html", tmp_path / "file" / "page.html"]).refused(4)
    assert "page.html cannot be written" in message
    wrong = ["--max_length", "999", "--capture.shard_tokens", "999", "--corpus.column", "chat"]
    message = stage("preview", [*flags, *wrong]).refused(2)
    assert "expected at most the teacher's 512 positions" in message
    assert "there is no column 'chat'" in message


def test_colours_on_a_terminal(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from stages.preview import print_preview

    found = preview_of(_run([*tiny.stage_one, "--cache_dir", tmp_path]), rows="0")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_preview(found)
    coloured = capsys.readouterr().out
    assert "\x1b[1;32;7m<|im_end|>\x1b[0m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    print_preview(found, shown_tokens=10)
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    assert "more tokens (--shown_tokens)" in plain
