"""Truncation, counts, identities and the held-out split of complete corpora."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.split import HeldoutRule, sample_id
from pipeline.errors import CorpusError

Build = Callable[..., Any]

ROWS = [{"text": f"row {i} " + "what does it do " * (i % 7 + 1)} for i in range(300)]


def _splits(corpus: Any) -> dict[str, str]:
    return {sample.sample_id: sample.split for sample in corpus.samples}


def test_truncation_is_supervised(build: Build, write_jsonl: Build) -> None:
    path = write_jsonl(ROWS[:14])
    whole = build(path).samples
    corpus = build(path, max_length=12)
    lengths = [len(sample.input_ids) for sample in whole]
    assert corpus.counts.truncated_rows == sum(length > 12 for length in lengths) > 0
    assert corpus.counts.truncated_tokens == sum(max(0, length - 12) for length in lengths)
    for cut, full in zip(corpus.samples, whole, strict=True):
        assert cut.input_ids.tolist() == full.input_ids[:12].tolist()
        assert cut.sample_id == full.sample_id


def test_split_keeps_every_token(build: Build, write_jsonl: Build) -> None:
    path = write_jsonl(ROWS[:14])
    whole = build(path).samples
    corpus = build(path, max_length=12, overlong="split")
    for full in whole:
        parts = [s for s in corpus.samples if s.source_index == full.source_index]
        assert [part.part for part in parts] == list(range(len(parts)))
        joined = np.concatenate([part.input_ids for part in parts])
        # A last part of one token has no label and is left out.
        assert len(full.input_ids) - len(joined) in (0, 1)
        assert joined.tolist() == full.input_ids[: len(joined)].tolist()
        assert all(not part.loss_mask[0] and len(part.input_ids) <= 12 for part in parts)
    long = sum(len(sample.input_ids) > 12 for sample in whole)
    assert corpus.counts.split_rows == long
    expected = sum(-(-len(s.input_ids) // 12) for s in whole if len(s.input_ids) > 12)
    assert corpus.counts.split_parts == expected
    assert corpus.counts.truncated_rows == corpus.counts.truncated_tokens == 0
    assert len({sample.sample_id for sample in corpus.samples}) == corpus.counts.samples


def test_drop_leaves_long_rows_out(build: Build, write_jsonl: Build) -> None:
    path = write_jsonl(ROWS[:14])
    short = [s.sample_id for s in build(path).samples if len(s.input_ids) <= 20]
    corpus = build(path, max_length=20, overlong="drop")
    assert [sample.sample_id for sample in corpus.samples] == short
    assert corpus.counts.dropped_overlong == 14 - len(short) > 0


def test_counts_add_up(build: Build, write_jsonl: Build) -> None:
    rows = [*ROWS[:50], {"text": ""}, {"text": None}]
    corpus = build(write_jsonl(rows), heldout_fraction=0.3)
    counts = corpus.counts
    assert counts.rows == 52
    assert counts.dropped_no_labels == 2
    assert counts.samples == len(corpus.samples) == 50 == counts.train + counts.heldout
    assert counts.heldout == sum(s.split == "heldout" for s in corpus.samples) > 0
    assert counts.tokens == sum(len(s.input_ids) for s in corpus.samples)
    assert counts.loss_tokens == sum(int(s.loss_mask.sum()) for s in corpus.samples)
    assert corpus.samples[0].input_ids.dtype == np.int32
    assert corpus.samples[0].loss_mask.dtype == np.bool_


def test_answer_beyond_the_cut_is_dropped_and_supervised(build: Build, write_jsonl: Build) -> None:
    long = {"prompt": "what " * 50, "completion": "cut off"}
    short = {"prompt": "what", "completion": "answer"}
    corpus = build(write_jsonl([long, short]), max_length=60)
    assert corpus.counts.dropped_no_labels == 1
    assert [sample.source_index for sample in corpus.samples] == [1]
    with pytest.raises(
        CorpusError, match=r"none of its 1 rows gave a sample .1 without a supervised token"
    ):
        build(write_jsonl([long]), max_length=60)


def test_two_builds_are_equal(build: Build, write_jsonl: Build) -> None:
    path = write_jsonl(ROWS)
    one, two = (build(path, heldout_fraction=0.1, max_length=32, overlong="split") for _ in "ab")
    assert one.identity == two.identity
    assert one.counts == two.counts
    for a, b in zip(one.samples, two.samples, strict=True):
        assert (a.sample_id, a.split, a.part) == (b.sample_id, b.split, b.part)
        assert a.input_ids.tobytes() == b.input_ids.tobytes()
        assert a.loss_mask.tobytes() == b.loss_mask.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"max_length": 9}, {"overlong": "drop"}, {"heldout_fraction": 0.2},
        {"heldout_samples": 1}, {"num_samples": 20}, {"add_eos": False}, {"loss_on": "all"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_identity_knows_every_setting_that_matters(
    change: dict[str, Any], build: Build, write_jsonl: Build
) -> None:
    path = write_jsonl(ROWS[:40])
    assert build(path).identity != build(path, **change).identity


@pytest.mark.parametrize("at_most", [None, 7])
def test_more_rows_move_nothing_between_the_splits(
    at_most: int | None, build: Build, write_jsonl: Build
) -> None:
    path = write_jsonl(ROWS)
    options = {"heldout_fraction": 0.2, "heldout_samples": at_most}
    all_of_them = _splits(build(path, **options))
    for number in (10, 75, 299):
        some = _splits(build(path, num_samples=number, **options))
        assert len(some) == number
        assert some.items() <= all_of_them.items()
    held = sum(split == "heldout" for split in all_of_them.values())
    assert held == 7 if at_most else 40 <= held <= 80


def test_another_file_moves_no_row_of_the_others(
    build: Build, write_jsonl: Build, tmp_path: Path
) -> None:
    write_jsonl(ROWS[:100], "chats/b.jsonl")
    before = build(tmp_path / "chats", heldout_fraction=0.2)
    write_jsonl(ROWS[100:200], "chats/a.jsonl")
    after = build(tmp_path / "chats", heldout_fraction=0.2)
    assert _splits(before).items() <= _splits(after).items()
    assert [s.source_index for s in after.samples if s.sample_id in _splits(before)] == [
        *range(100, 200)
    ]
    rule = HeldoutRule(42, "files/chats", 0.2, None)
    lines = (tmp_path / "chats" / "b.jsonl").read_bytes().splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))][:-1]
    held = [rule.is_candidate(rule.hash_of(f"b.jsonl:{start}")) for start in starts]
    assert [s.split == "heldout" for s in before.samples] == held


def test_seed_decides_the_split_but_not_the_ids(build: Build, write_jsonl: Build) -> None:
    path = write_jsonl(ROWS)
    one, two = (build(path, seed=seed, heldout_fraction=0.2) for seed in (1, 2))
    assert [s.sample_id for s in one.samples] == [s.sample_id for s in two.samples]
    assert _splits(one) != _splits(two)


def test_parts_of_a_row_share_its_split(build: Build, write_jsonl: Build) -> None:
    corpus = build(write_jsonl(ROWS), heldout_fraction=0.3, max_length=8, overlong="split")
    by_row: dict[int, set[str]] = {}
    for sample in corpus.samples:
        by_row.setdefault(sample.source_index, set()).add(sample.split)
    assert all(len(splits) == 1 for splits in by_row.values())
    assert {next(iter(splits)) for splits in by_row.values()} == {"train", "heldout"}
    assert corpus.counts.split_parts > corpus.counts.split_rows > 0


@given(
    seed=st.integers(0, 2**63),
    keys=st.lists(st.text(max_size=8), unique=True, max_size=60),
    fraction=st.floats(0, 0.999),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_split_ignores_order_and_number(
    seed: int, keys: list[str], fraction: float, shuffle: random.Random
) -> None:
    def splits(of: list[str]) -> dict[str, bool]:
        rule = HeldoutRule(seed, "source", fraction, None)
        return {key: rule.is_candidate(rule.hash_of(key)) for key in of}

    whole = splits(keys)
    taken = shuffle.sample(keys, shuffle.randint(0, len(keys)))
    assert splits(taken).items() <= whole.items()
    assert fraction > 0 or not any(whole.values())


def _held(rule: HeldoutRule, keys: Iterable[str]) -> list[bool]:
    found, candidates = [], 0
    for key in keys:
        row_hash = rule.hash_of(key)
        is_candidate = rule.is_candidate(row_hash)
        found.append(is_candidate and rule.holds_out(row_hash, candidates))
        candidates += is_candidate
    return found


@given(
    keys=st.lists(st.text(max_size=8), unique=True, max_size=80),
    at_most=st.integers(0, 10),
    number=st.integers(0, 80),
)
@settings(max_examples=60, deadline=None)
def test_capped_split_ignores_what_follows(keys: list[str], at_most: int, number: int) -> None:
    rule = HeldoutRule(3, "source", 0.4, at_most)
    whole = _held(rule, keys)
    assert _held(rule, keys[:number]) == whole[:number]
    assert sum(whole) <= at_most


def test_fraction_is_met() -> None:
    held = sum(_held(HeldoutRule(42, "source", 0.02, None), map(str, range(20_000))))
    assert 340 <= held <= 460  # 400 and three standard deviations


@pytest.mark.parametrize(("rows", "about"), [(100_000, 1044), (1_000_000, 1965)])
def test_about_two_thousand_rows_of_a_large_corpus_are_held_out(rows: int, about: int) -> None:
    """Of 100 thousand rows 2,000 are candidates, of a million 20,000: 400 (1 + ln(n / 400))."""
    held = _held(HeldoutRule(42, "source", 0.02, None), map(str, range(rows)))
    assert abs(sum(held) - about) < 4 * about**0.5
    # And not the first ones alone: of a source in some order, all of it is seen.
    assert sum(held[rows // 2 :]) > 200


def test_sample_ids_are_distinct_and_frozen() -> None:
    ids = {sample_id(s, k, p) for s in ("a", "ab") for k in ("c", "bc", "b") for p in range(3)}
    assert len(ids) == 18
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)
    # A cache holds these ids indefinitely: a change of the rule must be noticed.
    assert sample_id("files/chats", "a.jsonl:0", 0) == "b04d96cbee6e8bb4c2e7c0f0aea91eeb"


def test_everything_held_out_is_refused(build: Build, write_jsonl: Build) -> None:
    with pytest.raises(CorpusError, match="all of its 3 samples are held out"):
        build(write_jsonl(ROWS[:3]), heldout_fraction=1 - 1e-12)


def test_fewer_held_out_than_asked_is_logged(
    build: Build, write_jsonl: Build, caplog: pytest.LogCaptureFixture
) -> None:
    build(write_jsonl(ROWS[:20]), heldout_fraction=0.1, heldout_samples=15)
    assert "of at most 15 rows are held out" in caplog.text


def test_mistakes_in_settings() -> None:
    for wrong in ({"max_length": 1}, {"num_samples": 0}, {"heldout_fraction": 1.0}):
        with pytest.raises(ValidationError):
            CorpusSettings(**wrong)
    with pytest.raises(ValidationError, match="system_prompt is given, but format text"):
        CorpusSettings(format="text", system_prompt="x")


def test_import_needs_no_heavy_package() -> None:
    code = (
        "import sys, pipeline.corpus; heavy = {'torch', 'transformers', 'datasets', 'pyarrow', "
        "'fsspec', 'jinja2', 'tokenizers', 'pandas'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_log_says_how_many_rows_of_a_small_corpus_are_held_out(
    build: Build, write_jsonl: Build, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = build(write_jsonl(ROWS[:12]), heldout_fraction=1e-9, heldout_samples=1)
    assert corpus.counts.heldout == 1
    assert "at most" not in caplog.text
    build(write_jsonl(ROWS[:12]), heldout_fraction=1e-9, heldout_samples=9)
    assert "only 3 of at most 9 rows are held out" in caplog.text


def test_settings_of_chats_without_effect_are_named(
    build: Build, write_jsonl: Build, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    chat = {"messages": turns}
    led = {"messages": [{"role": "system", "content": "Own."}, *turns]}
    build(write_jsonl([chat, led]), system_prompt="Given.", max_quarantined_fraction=0.5)
    build(write_jsonl([chat]), loss_on="all", on_bad_row="refuse")
    assert "no effect" not in caplog.text
    build(
        write_jsonl([led]), system_prompt="Given.", max_quarantined_fraction=0.5,
        loss_on="all", on_bad_row="refuse", supervise_empty=True,
    )  # fmt: skip
    assert "system_prompt has no effect: each chat has a system message" in caplog.text
    assert "max_quarantined_fraction has no effect with on_bad_row refuse" in caplog.text
    assert "supervise_empty has no effect with loss_on all" in caplog.text


def test_documents_that_get_no_end_are_named(
    build: Build, write_jsonl: Build, make_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl([{"text": "what does it do"}])
    using = make_tokenizer()
    build(path, using=using)
    using.eos_token = None
    build(path, using=using, add_eos=False)
    assert "add_eos" not in caplog.text
    build(path, using=using)
    assert "add_eos has no effect: the tokenizer has no EOS" in caplog.text
