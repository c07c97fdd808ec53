"""The corpus of conformance is sound: what it expects is what templates and files hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.chats import CHATS, Chat
from tests.conformance.containers import groups, write
from tests.conformance.expected import NO_SAMPLE, QUARANTINED, expected
from tests.conformance.rendering import rendered
from tests.conformance.templates import TEMPLATES, Template
from tests.conformance.vocabularies import KINDS, comparable, holds, tokenizer_of

BY_NAME = {template.name: template for template in TEMPLATES}
every_template = pytest.mark.parametrize("template", TEMPLATES, ids=lambda each: each.name)


@every_template
def test_the_corpus_itself_says_what_the_templates_render(template: Template) -> None:
    """Expectations stand, in order, in what transformers renders, without the pipeline."""
    for chat in CHATS:
        if chat.bad or not chat.turns:
            continue
        text = rendered(chat, template)
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
