"""What preparation settles before the teacher: small corpora, foreign tokens, ends of turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.corpus.intake import TeacherTokens
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.split import HeldoutRule
from pipeline.errors import CorpusError
from tests.whole_corpus import build_corpus

Build = Callable[..., Any]

QUESTION = {"role": "user", "content": "what"}
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NO_TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _chats(number: int) -> list[dict[str, Any]]:
    return [
        {"messages": [QUESTION, {"role": "assistant", "content": f"answer {n}"}]}
        for n in range(number)
    ]


def test_thirty_rows_with_the_default_split_hold_some_out(
    tokenizer: Any, write_jsonl: Build, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(_chats(30))
    for seed in range(20):
        corpus = build_corpus(
            CorpusSettings(dataset_name=str(path)), tokenizer=tokenizer, seed=seed
        )
        assert 4 <= corpus.counts.heldout <= 6
        assert corpus.counts.train == 30 - corpus.counts.heldout
        held = [s.source_index for s in corpus.samples if s.split == "heldout"]
        assert held == [s.source_index for s in corpus.samples.of_split("heldout")]
    assert "smallest hashes are held out as well" in caplog.text


def test_the_rows_of_the_smallest_hashes_are_held_out(build: Build, write_jsonl: Build) -> None:
    path = write_jsonl(_chats(40))
    corpus = build(path, seed=7, heldout_fraction=1e-9)
    rule = HeldoutRule(7, f"files/{path.name}", 1e-9, None)
    starts = [0, *itertools.accumulate(map(len, path.read_bytes().splitlines(keepends=True)))]
    by_hash = sorted(range(40), key=lambda row: rule.hash_of(f"{path.name}:{starts[row]}"))
    held = {s.source_index for s in corpus.samples.of_split("heldout")}
    assert held == set(by_hash[:4])


@pytest.mark.parametrize(("rows", "heldout"), [(2, 1), (3, 1), (8, 2), (16, 4)])
def test_never_more_than_a_quarter_but_always_one(
    build: Build, write_jsonl: Build, rows: int, heldout: int
) -> None:
    counts = build(write_jsonl(_chats(rows)), heldout_fraction=1e-9).counts
    assert (counts.train, counts.heldout) == (rows - heldout, heldout)


def test_one_row_cannot_be_divided(build: Build, write_jsonl: Build) -> None:
    path = write_jsonl(_chats(1))
    with pytest.raises(CorpusError, match=r"no row is held out.*heldout_fraction 0 to train"):
        build(path, heldout_fraction=0.02)
    assert build(path, heldout_fraction=0).counts.heldout == 0
    assert build(path, heldout_samples=0, heldout_fraction=0.02).counts.heldout == 0


def test_all_parts_of_a_row_go_together(build: Build, write_jsonl: Build) -> None:
    rows = [{"text": "what does it do " * 9} for _ in range(12)]
    corpus = build(write_jsonl(rows), heldout_fraction=1e-9, max_length=16, overlong="split")
    splits = {(s.source_index, s.split) for s in corpus.samples}
    assert len(splits) == 12
    assert sum(split == "heldout" for _, split in splits) == 3


def test_a_token_beyond_the_embedding_is_named(tokenizer: Any, write_jsonl: Build) -> None:
    size = tokenizer.convert_tokens_to_ids("<|im_end|>") + 1
    settings = CorpusSettings(dataset_name=str(write_jsonl([{"text": "what"}])))
    with pytest.raises(CorpusError, match=rf"line 1: token \d+ \(.*ids below {size}"):
        build_corpus(settings, tokenizer=tokenizer, seed=1, teacher=TeacherTokens((), size))


def test_turns_without_an_end_are_said(
    build: Build, write_jsonl: Build, caplog: pytest.LogCaptureFixture
) -> None:
    build(write_jsonl(_chats(3)), chat_template=NO_END)
    assert "all of 3 supervised turns end without a token that ends generation" in caplog.text
    caplog.clear()
    build(write_jsonl(_chats(3)))
    assert "ends generation" not in caplog.text


def test_a_template_option_that_the_template_lacks(build: Build, write_jsonl: Build) -> None:
    path = write_jsonl(_chats(2))
    with pytest.raises(CorpusError, match=r"no variable enable_thinkin\b.*enable_thinking"):
        build(
            path, chat_template=NO_TOOLS + "{{ enable_thinking }}",
            template_options={"enable_thinkin": True},
        )  # fmt: skip
    template = NO_TOOLS.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n' + style")
    template = template.replace("m.content", "(style if m.role == 'user' else '') + m.content")
    one, two = (
        build(path, chat_template=template, template_options={"style": style}) for style in "ab"
    )
    assert one.identity != two.identity


def test_a_share_of_bad_rows_stops_the_run(build: Build, write_jsonl: Build) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    lost = {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    few, many = ([*_chats(150), *[lost] * number] for number in (7, 11))
    assert build(write_jsonl(few), chat_template=NO_TOOLS).counts.quarantined == 7
    path = write_jsonl(many)
    with pytest.raises(CorpusError, match=r"(?s)11 of 161 rows .6.8%.*tool call does not appear"):
        build(path, chat_template=NO_TOOLS)
    allowed = build(path, chat_template=NO_TOOLS, max_quarantined_fraction=0.1)
    assert allowed.counts.quarantined == 11
    with pytest.raises(CorpusError, match=r"line 151: message 2 .assistant.: a tool call"):
        build(write_jsonl(few[:151]), chat_template=NO_TOOLS, on_bad_row="refuse")
