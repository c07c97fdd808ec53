"""Codec "ranked": round trips within quantisation; rows move between shards unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.codec.spec import (
    MAX_VOCAB_SIZE,
    CodecSpec,
    CodedRows,
    frequency_classes,
    order_of_classes,
)
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.tables import encode_table, table_from_bytes
from pipeline.cache.io.writer import encode_shard
from pipeline.cache.layout.schema import table_to_rows
from pipeline.cache.tools.verify import verify_cache
from pipeline.errors import CacheError
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.quantisation import SAMPLED_QUANTISATION, Quantisation
from pipeline.storage import Store
from tests.unit.cache.sample_cache import SPEC, TEMPERATURES, read_all, rows_to_table, sample_rows
from tests.unit.cache.sampled_cache import GRID, RULES, VOCAB, sampled_rows, write_sampled_cache


def _through(rows: list[CachedSequence], tails: list[Any], spec: CodecSpec) -> pa.Table:
    """Return what Parquet gives back of the rows."""
    _, data = encode_shard(
        rows, spec, split="train", index=0, temperatures=GRID, identity_digest="0" * 64,
        tails=tails,
    )  # fmt: skip
    return pq.read_table(pa.BufferReader(data))


@given(
    seed=st.integers(0, 2**32),
    number=st.integers(0, 4),
    rule=st.sampled_from(RULES),
    exact=st.sampled_from([0, 3]),
    vocab=st.sampled_from([30, 500, 3000]),
)
@settings(max_examples=40, deadline=None)
def test_sampled_rows_come_back(
    seed: int, number: int, rule: InclusionRule, exact: int, vocab: int
) -> None:
    rows, tails = sampled_rows(number, seed, rule, exact=exact, vocab=vocab)
    spec = CodecSpec(vocab, rule)
    table = _through(rows, tails, spec)
    got = table_to_rows(table, spec, GRID)
    assert len(got) == number
    for before, after in zip(rows, got, strict=True):
        a, b = before.targets, after.targets
        assert (before.sample_id, before.input_ids_L.tolist(), before.loss_mask_L.tolist()) == (
            after.sample_id, after.input_ids_L.tolist(), after.loss_mask_L.tolist()
        )  # fmt: skip
        assert a.counts_N.tolist() == b.counts_N.tolist()
        assert a.token_ids_E.tolist() == b.token_ids_E.tolist()
        assert a.log_z_NG.tolist() == b.log_z_NG.tolist()
        assert (a.temperatures, a.sampled_step) == (b.temperatures, b.sampled_step)
        assert a.inclusion_E is not None
        assert b.inclusion_E is not None
        sampled_E = a.inclusion_E < 1
        assert (sampled_E == (b.inclusion_E < 1)).all()
        np.testing.assert_allclose(a.inclusion_E, b.inclusion_E, rtol=1e-4)
        np.testing.assert_allclose(a.logprobs_E[sampled_E], b.logprobs_E[sampled_E], atol=1e-4)
        p, q = np.exp(a.logprobs_E[~sampled_E]), np.exp(b.logprobs_E[~sampled_E])
        np.testing.assert_allclose(p, q, atol=0.012)
        half = spec.quantisation.entropy_step / 2
        np.testing.assert_allclose(a.entropy_NG, b.entropy_NG, atol=1.01 * half)


@given(seed=st.integers(0, 2**32), count=st.sampled_from([1, 2, 64, 300, 499]))
@settings(max_examples=15, deadline=None)
def test_many_always_kept_entries_come_back(seed: int, count: int) -> None:
    """Counts above a byte, and runs long enough for the other sort."""
    rng = np.random.default_rng(seed)
    rows, tails = sample_rows(2, seed)
    chosen = []
    for row in rows:
        number = row.targets.num_positions
        ids = [np.sort(rng.permutation(VOCAB)[:count]) for _ in range(number)]
        targets = replace(
            row.targets,
            counts_N=np.full(number, count, np.int32),
            token_ids_E=np.concatenate([np.zeros(0), *ids]).astype(np.int32),
            logprobs_E=rng.uniform(-9, -6.5, number * count).astype(np.float32),
        )
        chosen.append(replace(row, targets=targets))
    for before, after in zip(chosen, table_to_rows(_through(chosen, tails, SPEC), SPEC, GRID),
                             strict=True):  # fmt: skip
        assert before.targets.counts_N.tolist() == after.targets.counts_N.tolist()
        assert before.targets.token_ids_E.tolist() == after.targets.token_ids_E.tolist()


def test_the_largest_vocabulary_comes_back() -> None:
    """A step over all ranks: from the most frequent token to the last of a shard that has all."""
    spec = CodecSpec(MAX_VOCAB_SIZE)
    row, tail = next(
        (row, tail)
        for row, tail in zip(*sample_rows(20, 5), strict=True)
        if row.targets.num_positions >= 9
    )
    number = row.targets.num_positions
    everything = np.array_split(np.arange(MAX_VOCAB_SIZE), 9)[:8]
    ids = [*everything, *[np.array([0, MAX_VOCAB_SIZE - 1])] * (number - 8)]
    targets = replace(
        row.targets,
        counts_N=np.array([len(one) for one in ids], np.int32),
        token_ids_E=np.concatenate(ids).astype(np.int32),
        logprobs_E=np.full(sum(map(len, ids)), -9.0, np.float32),
    )
    (got,) = table_to_rows(_through([replace(row, targets=targets)], [tail], spec), spec, GRID)
    assert got.targets.token_ids_E.tolist() == targets.token_ids_E.tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_a_dithered_grid_is_right_on_average(temperature: float) -> None:
    """For any p and T: the mean of the rounded p^(1/T), less the known factor, is p^(1/T)."""
    from pipeline.sampling.quantisation import rounding_log_bias

    quantisation, dither = Quantisation(), ((np.arange(4000) + 0.5) / 4000 - 0.5).astype(np.float32)
    bias = rounding_log_bias(quantisation.sampled_step, temperature)
    for log_p in (-1.7, -3.0, -9.123, -20.5):
        values = quantisation.sampled_value(
            quantisation.sampled_code(np.full(4000, log_p), dither), dither
        )
        assert np.abs(values - log_p).max() <= quantisation.sampled_step / 2 + 1e-4
        mean = np.exp(values.astype(np.float64) / temperature - bias).mean()
        assert mean == pytest.approx(np.exp(log_p / temperature), rel=1e-3)


@pytest.mark.parametrize("quantisation", [Quantisation(), SAMPLED_QUANTISATION])
def test_an_entropy_is_right_on_average(quantisation: Quantisation) -> None:
    """Also near 0, where one that is never negative would be too large on average."""
    dither = ((np.arange(4000) + 0.5) / 4000 - 0.5).astype(np.float32)
    for entropy in (0.0, 0.05, 0.3, 7.77):
        codes = quantisation.entropy_code(np.full(4000, entropy), dither)
        values = quantisation.entropy_value(codes, dither)
        assert np.abs(values - entropy).max() <= quantisation.entropy_step / 2 + 1e-3
        assert values.mean() == pytest.approx(entropy, abs=1e-3)


def test_frequent_tokens_get_short_ranks() -> None:
    rows, tails = sampled_rows(3, 1, RULES[0])
    from pipeline.cache.codec.arrow import quantised

    coded: CodedRows = quantised(rows, CodecSpec(VOCAB, RULES[0]), tails)[1]
    classes_V = frequency_classes(coded, VOCAB)
    times_V = np.bincount(
        np.concatenate([coded.always_kept.ids_E, coded.sampled.ids_E]), minlength=VOCAB
    )
    wanted = [0 if not n else 1 + int(2 * np.log2(n) + 1e-9) for n in times_V.tolist()]
    assert classes_V.tolist() == wanted
    order_V = order_of_classes(classes_V)
    assert sorted(order_V.tolist()) == list(range(VOCAB))
    keys = [(-int(classes_V[token]), int(token)) for token in order_V]
    assert keys == sorted(keys)


@pytest.mark.parametrize("rule", RULES)
def test_rows_move_between_shards_unchanged(rule: InclusionRule) -> None:
    """Written again, in one shard or several, a row decodes to the same numbers."""
    spec = CodecSpec(VOCAB, rule)
    rows, tails = sampled_rows(6, 3, rule)
    table = _through(rows, tails, spec)
    whole = encode_table([table], split="train", index=0, identity_digest="0" * 64)
    direct = encode_shard(
        rows, spec, split="train", index=0, temperatures=GRID, identity_digest="0" * 64,
        tails=tails,
    )  # fmt: skip
    assert whole == direct
    before = table_to_rows(table, spec, GRID)
    parts = [table.take(pa.array([4, 1])), table.slice(3, 1)]
    _, data = encode_table(parts, split="train", index=7, identity_digest="1" * 64)
    after = table_to_rows(table_from_bytes(data, "1" * 64), spec, GRID)
    for row, number in zip(after, (4, 1, 3), strict=True):
        _same(row, before[number])


def _same(one: CachedSequence, other: CachedSequence) -> None:
    assert one.sample_id == other.sample_id
    for name in ("counts_N", "token_ids_E", "logprobs_E", "inclusion_E", "log_z_NG", "entropy_NG",
                 "label_logprob_N"):  # fmt: skip
        assert getattr(one.targets, name).tolist() == getattr(other.targets, name).tolist()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"token_ids_E": [3, 3, 4, 9]}, "twice at one position"),
        ({"token_ids_E": [3, 700, 4, 9]}, "outside the vocabulary of 500"),
        ({"token_ids_E": [3, -1, 4, 9]}, "outside the vocabulary"),
        ({"logprobs_E": [-1, np.nan, -3, -4]}, "a log-probability is not finite"),
        ({"logprobs_E": [-1, -np.inf, -3, -4]}, "a log-probability is not finite"),
        ({"log_z_NG": [[0, np.inf], [0, 1]]}, "a statistic of the teacher is not finite"),
        ({"entropy_NG": [[np.nan, 1], [0, 1]]}, "a statistic of the teacher is not finite"),
        ({"label_logprob_N": [np.nan, 1]}, "a statistic of the teacher is not finite"),
        ({"counts_N": [1, 4]}, "differ in length"),
        ({"temperatures": (1.0, 3.0)}, "another temperature grid"),
    ],
)
def test_rows_that_no_reader_could_use_are_refused(change: dict[str, Any], found: str) -> None:
    from pipeline.cache.codec.targets import SparseTargets

    columns: dict[str, Any] = {
        "counts_N": [2, 2], "token_ids_E": [3, 5, 4, 9], "logprobs_E": [-1, -2, -3, -4],
        "log_z_NG": [[0, 1], [0, 1]], "entropy_NG": [[1, 2], [1, 2]], "label_logprob_N": [-1, -1],
        "temperatures": TEMPERATURES, **change,
    }  # fmt: skip
    integers = ("counts_N", "token_ids_E")
    targets = SparseTargets(
        inclusion_E=None,
        temperatures=columns.pop("temperatures"),
        **{
            name: np.array(value, np.int32 if name in integers else np.float32)
            for name, value in columns.items()
        },
    )
    row = CachedSequence(
        "0" * 32, np.array([1, 2, 3], np.int32), np.array([False, True, True]), targets
    )
    with pytest.raises(CacheError, match=found):
        rows_to_table(
            [row], SPEC, temperatures=TEMPERATURES, identity_digest="0" * 64,
            tails=[np.full(2, 0.1, np.float32)],
        )  # fmt: skip


def test_ids_beyond_the_codec_are_refused() -> None:
    with pytest.raises(CacheError, match=r"a vocabulary of 524288 tokens; expected 1 to 524287"):
        CodecSpec(1 << 19)


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 0},
        {"vocab_size": "many"},
        {"inclusion_rule": {"temperatures": [1.0], "taus": [1.5]}},
        {"inclusion_rule": {"temperatures": [1.0], "taus": [0.0]}},
        {"inclusion_rule": {"temperatures": [], "taus": []}},
        {"inclusion_rule": 3},
        {"quantisation": {"always_kept_step": 0.0}},
        {"quantisation": {"always_kept_step": 3.0}},
        {"quantisation": {"no_such_step": 1.0}},
        {"quantisation": None},
    ],
)
def test_a_codec_no_writer_wrote_is_refused(change: dict[str, Any]) -> None:
    good = CodecSpec(500, RULES[1]).to_json()
    assert CodecSpec.from_json(good) == CodecSpec(500, RULES[1])
    with pytest.raises(CacheError):
        CodecSpec.from_json({**good, **change})


def test_commands_on_a_sampled_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """inspect, verify, stats, slice, merge and export take sampled entries as they are."""
    from pipeline.cache.__main__ import main

    one = tmp_path / "one"
    write_sampled_cache(str(one))
    assert verify_cache(Store(str(one))) == []
    for command in ("inspect", "verify", "stats"):
        assert main([command, str(one)]) == 0
    assert main(["slice", str(one), str(tmp_path / "half"), "--fraction", "0.7"]) == 0
    assert main(["slice", str(one), str(tmp_path / "subsample"), "--tau-factor", "3"]) == 0
    assert main(["export", str(one), str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    before = {row.sample_id: row for row in read_all(open_cache(str(one)))}
    half = read_all(open_cache(str(tmp_path / "half")))
    assert 0 < len(half) < len(before)
    for row in half:
        _same(row, before[row.sample_id])
    subsample = open_cache(str(tmp_path / "subsample"))
    assert subsample.rule == RULES[1].scaled(3)
    assert verify_cache(subsample.store) == []
    source = open_cache(str(one)).source("train", tau_factor=3)
    rows = [row for s, n in enumerate(source.shard_rows()) for row in source.read_rows(s, range(n))]
    stored = {row.sample_id: row for row in read_all(subsample)}
    for row in rows:
        _same(row, stored[row.sample_id])
    plain = pq.read_table(tmp_path / "plain/data/train/00000.parquet").to_pylist()
    for item in plain:
        targets = before[item["sample_id"]].targets
        assert targets.inclusion_E is not None
        got = np.concatenate([np.zeros(0), *item["target_inclusion"]])
        np.testing.assert_allclose(got, targets.inclusion_E, rtol=1e-6)


def test_sampled_entries_without_a_rule_are_damage() -> None:
    """Nothing says what they were sampled with: taken for always kept, they would be biased."""
    rows, tails = sampled_rows(3, 1, RULES[1])
    table = _through(rows, tails, CodecSpec(VOCAB, RULES[1]))
    place = table.schema.get_field_index("tail")
    tail = pa.array([bytes(row.targets.num_positions) for row in rows], pa.binary())
    table = table.set_column(place, table.schema.field("tail"), tail)
    with pytest.raises(CacheError, match="sampled entries in a cache without an inclusion rule"):
        table_to_rows(table, CodecSpec(VOCAB), GRID)
