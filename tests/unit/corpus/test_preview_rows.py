"""The rows of a preview are those of the corpus: tokens, masks, names, split, faults and cuts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.corpus.intake import TeacherTokens
from pipeline.corpus.preview.choice import choose_rows
from pipeline.corpus.preview.collect import preview_corpus
from pipeline.corpus.preview.record import Preview
from pipeline.corpus.prompts import PromptIntake, PromptLimits
from pipeline.corpus.reading import open_reading
from pipeline.corpus.samples import SampleIntake
from pipeline.corpus.settings import CorpusSettings
from pipeline.errors import ConfigError
from tests.conformance.chats import CHATS
from tests.conformance.containers import groups, write
from tests.conformance.templates import TEMPLATES
from tests.conformance.vocabularies import tokenizer_of
from tests.whole_corpus import Corpus, build_corpus, build_prompts

ALL = "0:1000"


def _chat(answer: str, question: str = "What?") -> dict[str, Any]:
    messages = [
        {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    ]  # fmt: skip
    return {"messages": messages}


@pytest.fixture
def preview(tokenizer: Any) -> Callable[..., Preview]:
    """Return a function that previews a file with short-hand settings."""

    def run(
        path: Path | str, rows: str = ALL, *, using: Any = None, sample_rows: int = 1000,
        ends: tuple[int, ...] = (), **settings: Any,
    ) -> Preview:  # fmt: skip
        settings.setdefault("heldout_fraction", 0.0)
        chosen = CorpusSettings(dataset_name=str(path), **settings)
        intake = SampleIntake(
            chosen, using or tokenizer, open_reading(chosen, few=True), 42, TeacherTokens(ends),
            chosen.add_eos,
        )  # fmt: skip
        return preview_corpus(intake, choose_rows(rows), sample_rows=sample_rows)

    return run


def _same(found: Preview, corpus: Corpus) -> None:
    """Compare what is shown with the samples of the corpus."""
    shown = {
        part.sample_id: (row, part) for row in found.rows for part in row.parts
    }  # fmt: skip
    assert shown.keys() == {sample.sample_id for sample in corpus.samples}
    for sample in corpus.samples:
        row, part = shown[sample.sample_id]
        np.testing.assert_array_equal(part.input_ids_L, sample.input_ids)
        np.testing.assert_array_equal(part.loss_mask_L, sample.loss_mask)
        assert (row.number, part.number, row.split) == (
            sample.source_index, sample.part, sample.split
        )  # fmt: skip
        assert [t for piece in part.pieces for t in piece.ids] == sample.input_ids.tolist()
    totals, counts = found.totals, corpus.counts
    assert (totals.rows, totals.samples) == (counts.rows, counts.samples)
    assert (totals.tokens, totals.loss_tokens) == (counts.tokens, counts.loss_tokens)
    assert totals.bad == counts.quarantined
    for name in ("truncated_rows", "truncated_tokens", "split_rows", "dropped_no_labels"):
        assert totals.counts.get(name, 0) == getattr(counts, name)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_every_chat_under_every_template(template: Any, tmp_path: Path, preview: Any) -> None:
    """The chats of the conformance suite, with its templates, out of JSON Lines."""
    tokenizer = tokenizer_of("bytes", template)
    ends = tuple(int(tokenizer.convert_tokens_to_ids(token)) for token in template.end_tokens)
    for number, group in enumerate(groups(list(CHATS), "jsonl")):
        path = write([chat.row for chat in group], "jsonl", tmp_path / str(number))
        settings: dict[str, Any] = {"max_length": 2000, "max_quarantined_fraction": 1.0}
        chosen = CorpusSettings(dataset_name=str(path), heldout_fraction=0.0, **settings)
        try:
            corpus = build_corpus(chosen, tokenizer=tokenizer, seed=42, teacher=TeacherTokens(ends))
        except Exception:  # a file of which no row can be used
            continue
        _same(preview(path, using=tokenizer, ends=ends, **settings), corpus)


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_what_is_cut(overlong: str, write_jsonl: Any, preview: Any, build: Any) -> None:
    rows = [_chat("short"), _chat("long " * 30), _chat("", "only a question"), {"messages": 7}]
    path = write_jsonl(rows)
    settings = {"max_length": 40, "overlong": overlong}
    found = preview(path, **settings)
    _same(found, build(path, **settings))
    assert [row.number for row in found.rows] == [0, 1, 2, 3]
    long, empty, bad = found.rows[1:]
    assert long.tokens > 40
    if overlong == "truncate":
        (part,) = long.parts
        assert (part.lost_before, part.lost_after) == (0, long.tokens - 40)
        assert 0 < part.lost_supervised <= part.lost_after
    elif overlong == "split":
        assert len(long.parts) == -(-long.tokens // 40)
        assert {part.lost_after for part in long.parts} == {0}
    else:
        assert (long.outcome, long.parts) == ("dropped", ())
        assert "longer than 40 tokens" in long.reason
    assert (empty.outcome, empty.reason) == ("dropped", "no supervised token")
    assert bad.outcome == "quarantined"
    assert "line 4" in bad.reason


@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.3])
def test_the_split(fraction: float, write_jsonl: Any, preview: Any, build: Any) -> None:
    path = write_jsonl([_chat(f"answer {number}") for number in range(60)])
    found = preview(path, heldout_fraction=fraction)
    _same(found, build(path, heldout_fraction=fraction))
    assert found.totals.is_all
    assert found.totals.is_settled
    assert bool(found.totals.heldout_rows) == bool(fraction)


def test_a_row_far_away_has_the_split_of_the_corpus(
    write_jsonl: Any, preview: Any, build: Any
) -> None:
    path = write_jsonl([_chat(f"answer {number}") for number in range(300)])
    corpus = build(path, heldout_fraction=0.2)
    split = {sample.source_index: sample.split for sample in corpus.samples}
    found = preview(path, "250:300", sample_rows=10, heldout_fraction=0.2)
    assert {row.number: row.split for row in found.rows} == {n: split[n] for n in range(250, 300)}
    assert found.totals.rows == 10  # the others are not summed up


def test_rows_by_what_goes_wrong(write_jsonl: Any, preview: Any) -> None:
    rows = [_chat("ok"), _chat("word " * 50), {"messages": 1}, _chat("", "q"), {"messages": 2},
            _chat("word " * 60)]  # fmt: skip
    path = write_jsonl(rows)
    found = preview(path, "truncated,quarantined:2,dropped,longest,heldout", max_length=100)
    assert [row.number for row in found.rows] == [1, 2, 3, 4, 5]
    assert found.missing == ("heldout",)
    assert [row.number for row in preview(path, "5,0:2").rows] == [0, 1, 5]
    assert preview(path, "truncated").missing == ("truncated",)


def test_no_more_is_read_than_is_shown(write_jsonl: Any, preview: Any) -> None:
    path = write_jsonl([_chat(f"{n}") for n in range(50)])
    with path.open("ab") as file:
        file.write(b"\xff not even text")  # its reader would stop here
    found = preview(path, "0:2", sample_rows=20)
    assert found.totals.rows == 20
    assert not found.totals.is_all
    limited = preview(path, "0:9", num_samples=5)
    assert (limited.totals.rows, limited.totals.is_all, len(limited.rows)) == (5, True, 5)


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_prompts(overlong: str, write_jsonl: Any, tokenizer: Any) -> None:
    rows = [_chat("a", "first " * 40), _chat("b", "second?"), _chat("c")]
    chosen = CorpusSettings(
        dataset_name=str(write_jsonl(rows)), max_length=80, overlong=overlong, heldout_fraction=0.0
    )
    intake = PromptIntake(
        chosen, tokenizer, open_reading(chosen, answered=False), 42, TeacherTokens(),
        add_eos=False, limits=PromptLimits(4, 30),
    )  # fmt: skip
    found = preview_corpus(intake, choose_rows(ALL), sample_rows=10)
    corpus = build_prompts(chosen, tokenizer=tokenizer, seed=42, document_tokens=4, max_tokens=30)
    assert found.is_prompts
    assert {p.sample_id: p.input_ids_L.tolist() for row in found.rows for p in row.parts} == {
        sample.sample_id: sample.input_ids.tolist() for sample in corpus.samples
    }
    if overlong == "truncate":
        assert found.rows[0].parts[0].lost_before == found.rows[0].tokens - 30
        assert found.rows[0].parts[0].lost_after == 0
    else:
        assert found.rows[0].outcome == "dropped"


def test_a_choice_that_is_none() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_rows("0:2,quarantine,x:y,1-3")
    message = str(caught.value)
    assert message.startswith("3 mistakes in the configuration:")
    assert "did you mean quarantined?" in message
    with pytest.raises(ConfigError, match="expected at least one row"):
        choose_rows(" , ")
    assert choose_rows("3, 5:7,:2,longest:2").numbers == {0, 1, 3, 5, 6}
    assert choose_rows("3,longest:2").kinds == {"longest": 2}
