"""Every chat under every template gives the supervised text that was written down for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import CorpusError
from tests.conformance.chats import CHATS, Chat
from tests.conformance.containers import CONTAINERS, write
from tests.conformance.rendering import rendered
from tests.conformance.suite import (
    SHORT_CHATS,
    container_cases,
    empty_cases,
    named,
    reasoning_cases,
    tokenizer_cases,
)
from tests.conformance.templates import TEMPLATES, Template
from tests.conformance.trying import Case, build, try_chats, wrong
from tests.conformance.vocabularies import KINDS, tokenizer_of

BY_NAME = {template.name: template for template in TEMPLATES}
BAD = [chat for chat in CHATS if chat.bad]
every_template = pytest.mark.parametrize("template", TEMPLATES, ids=lambda each: each.name)


def _good_rows(mistakes: list[str]) -> None:
    assert not mistakes, "\n".join([f"{len(mistakes)} wrong", *mistakes])


@every_template
def test_chats_out_of_json_lines(template: Template) -> None:
    """The supervised text as expected, and the context around it as transformers renders it."""
    cases = try_chats(CHATS, template)
    _good_rows(wrong(cases))
    tokenizer = tokenizer_of("bytes", template)
    for chat, case in zip(_in_order(cases), cases, strict=True):
        if case.tokens is None:
            continue
        text = tokenizer.decode(case.tokens[0].tolist(), clean_up_tokenization_spaces=False)
        whole = rendered(chat, template) or ""
        if chat.turns[-1].open:
            assert whole.startswith(text), chat.name
        else:
            assert text == whole, chat.name


def _in_order(cases: list[Case]) -> list[Chat]:
    return named(*(case.chat for case in cases))


@pytest.mark.parametrize("container", [name for name in CONTAINERS if name != "jsonl"])
@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_chats_out_of_other_containers(name: str, container: str) -> None:
    cases = container_cases(BY_NAME[name], containers=[container], chats=SHORT_CHATS)
    _good_rows(wrong(list(cases)))


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "bytes"])
def test_chats_with_other_tokenizers(kind: str) -> None:
    cases = [case for template in TEMPLATES for case in tokenizer_cases(template, kind)]
    _good_rows(wrong(cases))


@every_template
def test_reasoning_left_to_the_template(template: Template) -> None:
    _good_rows(wrong(reasoning_cases(template, "template")))


@every_template
def test_reasoning_dropped(template: Template) -> None:
    _good_rows(wrong(reasoning_cases(template, "drop")))


# Where a template writes something before the content, "the bare end" of nothing is moot.
@pytest.mark.parametrize(
    "template",
    [each for each in TEMPLATES if each.name not in ("llama2", "zephyr", "mistral", "harmony")],
    ids=lambda each: each.name,
)
def test_empty_answers_supervised(template: Template) -> None:
    _good_rows(wrong(empty_cases(template)))


@pytest.mark.parametrize("chat", BAD, ids=lambda each: each.name)
def test_a_bad_row_is_named_and_leaves_the_others(
    chat: Chat, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = named("plain")[0]
    path = write([good.row, chat.row, good.row], "jsonl", tmp_path)
    corpus = build(path, BY_NAME["chatml"])
    assert [sample.source_index for sample in corpus.samples] == [0, 2]
    assert (corpus.counts.rows, corpus.counts.quarantined) == (3, 1)
    assert "line 2" in caplog.text
    with pytest.raises(CorpusError, match="line 2"):
        build(path, BY_NAME["chatml"], on_bad_row="refuse")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("chatml", "call"), ("chatml", "tools_without_call"), ("chatml", "reasoning"),
        ("gemma", "system_first"), ("llama2", "two_assistants"), ("qwen3", "reasoning_earlier"),
        ("deepseek", "reasoning_inline"), ("harmony", "call_parallel"),
        ("harmony", "system_middle"), ("mistral", "call_and_content"),
    ],
)  # fmt: skip
def test_a_row_that_its_template_loses_is_named(
    template: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = named("plain", name)
    path = write([good.row, bad.row], "jsonl", tmp_path)
    assert build(path, BY_NAME[template]).counts.quarantined == 1
    assert "line 2" in caplog.text
    with pytest.raises(CorpusError, match="line 2"):
        build(path, BY_NAME[template], on_bad_row="refuse")


def test_nothing_but_bad_rows_is_an_error(tmp_path: Path) -> None:
    rows = [chat.row for chat in BAD if not chat.name.startswith("lone")]
    with pytest.raises(CorpusError):
        build(write(rows, "jsonl", tmp_path), BY_NAME["chatml"])
