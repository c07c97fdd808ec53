"""Every chat under every template gives the supervised text that was written down for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CorpusError
from tests.conformance.chats import CHATS, Chat
from tests.conformance.chats.model import as_message
from tests.conformance.containers import CONTAINERS, groups, write
from tests.conformance.expected import NO_SAMPLE, QUARANTINED, expected
from tests.conformance.suite import (
    SHORT_CHATS,
    container_cases,
    empty_cases,
    named,
    reasoning_cases,
    tokenizer_cases,
)
from tests.conformance.templates import TEMPLATES, Template
from tests.conformance.trying import build, try_chats, wrong
from tests.conformance.vocabularies import KINDS, comparable, holds, tokenizer_of

BY_NAME = {template.name: template for template in TEMPLATES}
BAD = [chat for chat in CHATS if chat.bad]
every_template = pytest.mark.parametrize("template", TEMPLATES, ids=lambda each: each.name)


def _good_rows(mistakes: list[str]) -> None:
    assert not mistakes, "\n".join([f"{len(mistakes)} wrong", *mistakes])


@every_template
def test_chats_out_of_json_lines(template: Template) -> None:
    _good_rows(wrong(try_chats(CHATS, template)))


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


@every_template
def test_the_corpus_itself_says_what_the_templates_render(template: Template) -> None:
    """Expectations stand, in order, in what transformers renders, without the pipeline."""
    render = tokenizer_of("bytes", template).apply_chat_template
    for chat in CHATS:
        if chat.bad or not chat.turns:
            continue
        text = _rendered(render, chat)
        if expected(chat, template) == QUARANTINED:
            assert text is None or _loses(text, chat), f"{chat.name} is rendered whole"
            continue
        assert text is not None, f"{chat.name} is refused"
        at = 0
        for piece in _pieces(chat, template):
            found = text.find(piece, at)
            assert found >= 0, f"{chat.name}: {piece!r} is not in {text[at:]!r:.500}"
            at = found + len(piece)


@pytest.mark.parametrize("container", ["parquet", "save_to_disk"])
def test_the_typed_containers_hold_the_rows(container: str, tmp_path: Path) -> None:
    """But for Arrow's padding they are the rows, in the same order of keys."""
    for number, group in enumerate(groups(CHATS, container)):
        path = write([chat.row for chat in group], container, tmp_path / str(number))
        for chat, row in zip(group, _table_rows(path), strict=True):
            held, wanted = _without_nulls(row), _without_nulls(chat.row)
            assert held == wanted
            for what in (_arguments, lambda each: each.get("tools")):
                assert json.dumps(what(held)) == json.dumps(what(wanted)), chat.name


def _table_rows(path: Path) -> list[dict[str, Any]]:
    import datasets
    import pyarrow.parquet as pq

    if path.is_dir():
        return list(datasets.load_from_disk(str(path)))
    return list(pq.read_table(path).to_pylist())


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _arguments(row: dict[str, Any]) -> list[Any]:
    calls = [call for message in row.get("messages", []) for call in message.get("tool_calls", [])]
    return [call["function"]["arguments"] for call in calls]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizers_hold_what_they_are_trusted_with(kind: str) -> None:
    for template in (BY_NAME["qwen3"], BY_NAME["deepseek"], BY_NAME["vicuna"]):
        tokenizer = tokenizer_of(kind, template)
        for chat in CHATS:
            text = expected(chat, template)
            if holds(kind, text):
                ids = tokenizer.encode(text, add_special_tokens=False)
                back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                assert comparable(kind, back) == comparable(kind, text), chat.name
        assert len(tokenizer) <= 620


def _pieces(chat: Chat, template: Template) -> list[str]:
    """Return the expected text, cut where the answers are: each alone, the others as context."""
    from dataclasses import replace

    pieces = []
    for number, turn in enumerate(chat.turns):
        if turn.role == "assistant" and turn.supervised and not turn.empty:
            only = [
                replace(other, supervised=place == number) for place, other in enumerate(chat.turns)
            ]
            text = expected(replace(chat, turns=tuple(only)), template, supervise_empty=True)
            assert text != NO_SAMPLE
            pieces.append(text)
    return pieces


def _rendered(render: Callable[..., Any], chat: Chat) -> str | None:
    """Render the turns; arguments of calls as objects, or as text where objects are refused."""
    tools = chat.row.get("tools") if chat.tools else None
    tools = json.loads(tools) if isinstance(tools, str) else tools
    for as_text in (False, True):
        messages = [as_message(turn, as_text=as_text) for turn in chat.turns]
        messages = [{**message, "content": message["content"] or ""} for message in messages]
        try:
            return str(render(messages, tools=tools, tokenize=False))
        except Exception:
            continue
    return None


def _loses(text: str, chat: Chat) -> bool:
    """Whether something that the row holds is not in the text."""
    held = [call.name for turn in chat.turns for call in turn.calls]
    held += [turn.reasoning for turn in chat.turns if turn.reasoning]
    held += [turn.content for turn in chat.turns if turn.role in ("system", "assistant")]
    held += ["To search."] if chat.tools and len(chat.row["tools"]) > 1 else []
    held += ["To get_weather."] if chat.tools else []
    return any(piece.strip() not in text for piece in held) or any(
        text.count(call.name) < sum(call.name == other.name for other in turn.calls)
        for turn in chat.turns
        for call in turn.calls
    )
