"""The text that ships with Python: enough, clean, without repeats, the same every time."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.corpus.sources import embedded as embedded_text
from pipeline.corpus.sources.embedded import embedded_source
from pipeline.corpus.sources.rows import Row
from pipeline.errors import CorpusError

Build = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def parsed_once() -> Iterator[None]:
    """Parse the standard library once for this module; another process does so on its own."""
    trees = list(embedded_text._parse_modules())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded_text, "_parse_modules", lambda: iter(trees))
        yield


@pytest.fixture(scope="module")
def embedded(parsed_once: None) -> tuple[list[Row], dict[str, Any]]:
    """Return all rows and the identity of the embedded text."""
    source = embedded_source()
    return list(source.rows), source.identity


def _texts(row: Row) -> list[str]:
    if "text" in row.data:
        return [row.data["text"]]
    return [message["content"] for message in row.data["messages"]]


def test_there_is_enough_of_both_kinds(embedded: tuple[list[Row], dict[str, Any]]) -> None:
    rows, identity = embedded
    chats = [row for row in rows if "messages" in row.data]
    documents = [row for row in rows if "text" in row.data]
    assert len(chats) + len(documents) == len(rows)
    # Four characters to a token: at least 100,000 tokens of each kind.
    assert sum(len(text) for row in documents for text in _texts(row)) > 400_000
    assert sum(len(text) for row in chats for text in _texts(row)) > 400_000
    assert identity["python"] == ".".join(map(str, sys.version_info[:3]))


def test_nothing_occurs_twice(embedded: tuple[list[Row], dict[str, Any]]) -> None:
    rows, _ = embedded
    assert len({row.key for row in rows}) == len(rows)
    bodies = [_texts(row)[-1] for row in rows]
    assert len(set(bodies)) == len(bodies)


def test_texts_are_clean_and_short(embedded: tuple[list[Row], dict[str, Any]]) -> None:
    rows, _ = embedded
    for row in rows:
        body = _texts(row)[-1]
        assert len(body) >= 40
        if "messages" in row.data:
            assert len(body) <= 1200
            assert [m["role"] for m in row.data["messages"]] == ["user", "assistant"]
            assert body == body.strip()
            assert "._" not in row.data["messages"][0]["content"].split("(")[0]
    questions = {row.data["messages"][0]["content"].split()[0] for row in rows if len(row.data) == 1
                 and "messages" in row.data}  # fmt: skip
    assert {"What", "Explain", "How", "Describe"} <= questions


def test_any_beginning_holds_both_kinds(embedded: tuple[list[Row], dict[str, Any]]) -> None:
    rows, _ = embedded
    for start in range(0, 1000, 100):
        kinds = {next(iter(row.data)) for row in rows[start : start + 100]}
        assert kinds == {"text", "messages"}


def test_another_process_makes_the_same(embedded: tuple[list[Row], dict[str, Any]]) -> None:
    code = (
        "import sys; from pipeline.corpus.sources.embedded import embedded_source;"
        "print(embedded_source().identity['text_sha256']);"
        "assert not {'antigravity', 'this', 'tkinter', 'turtle', 'smtplib'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert done.stdout.strip() == embedded[1]["text_sha256"]


def test_build_with_smollm(build: Build, labels: Build, smollm: Any) -> None:
    corpus = build("embedded", using=smollm, num_samples=200, heldout_fraction=0.1)
    assert corpus.counts.samples == 200
    assert 5 <= corpus.counts.heldout <= 40
    assert corpus.identity["format"] == "mixed"
    chats = documents = 0
    for sample in corpus.samples:
        text = smollm.decode(sample.input_ids)
        if text.startswith("<|im_start|>system"):
            chats += 1
            answer = text.split("<|im_start|>assistant\n")[1]
            assert labels(sample, smollm) + "\n" == answer
        else:
            documents += 1
            assert sample.loss_mask[1:].all()
            assert text.endswith("<|im_end|>")
    assert chats > 0 < documents


def test_one_kind_can_be_chosen(build: Build, tokenizer: Any, make_tokenizer: Build) -> None:
    using = make_tokenizer(template=None)
    corpus = build("embedded", using=using, num_samples=20, format="text")
    assert corpus.identity["format"] == "text"
    assert corpus.identity["chat_template_sha256"] is None
    with pytest.raises(CorpusError, match="no chat template"):
        build("embedded", using=using, num_samples=20)
    chats = build("embedded", num_samples=20, format="messages")
    assert all(tokenizer.decode(s.input_ids).startswith("<|im_start|>") for s in chats.samples)


@pytest.mark.parametrize(
    "wrong", [{"format": "sharegpt"}, {"dataset_split": "test"}, {"column": "text"}]
)
def test_settings_that_do_not_fit_are_refused(wrong: dict[str, str], build: Build) -> None:
    with pytest.raises(CorpusError, match="the embedded text has"):
        build("embedded", **wrong)


def test_the_collector_rests_while_modules_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []
    trees = list(embedded_text._parse_modules())

    def parse_again() -> Iterator[Any]:
        for tree in trees:
            enabled.append(gc.isenabled())
            yield tree

    monkeypatch.setattr(embedded_text, "_parse_modules", parse_again)
    embedded_source.__wrapped__("both")
    assert set(enabled) == {False}
    assert gc.isenabled()
