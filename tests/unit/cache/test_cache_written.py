"""The log-probs with which a text was written, in a shard: kept, optional, free where absent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.codec.subsample import EntryLimit
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.tables import decode_table, encode_table, table_from_bytes
from pipeline.cache.io.writer import encode_shard
from pipeline.data.collate import collate
from pipeline.errors import CacheError
from tests.unit.cache.sample_cache import TEMPERATURES, sample_rows
from tests.unit.cache.sampled_cache import GRID, RULES, sampled_rows

WITH = CodecSpec(500, written_logprobs=True)


def _rows(number: int = 4, seed: int = 0) -> list[CachedSequence]:
    """Return rows with log-probs from almost 0 to below the lowest code."""
    draw = np.random.default_rng(seed)
    return [
        replace(
            row,
            targets=replace(
                row.targets,
                written_logprob_N=-draw.exponential(9.0, row.targets.num_positions).astype(
                    np.float32
                ),
            ),
        )
        for row in sample_rows(number, seed)[0]
    ]


def _shard(rows: list[CachedSequence], spec: CodecSpec, digest: str = "d") -> bytes:
    tails = [np.full(row.targets.num_positions, 0.25, np.float32) for row in rows]
    return encode_shard(
        rows, spec, split="train", index=0, temperatures=TEMPERATURES, identity_digest=digest,
        tails=tails,
    )[1]  # fmt: skip


def test_they_come_back_within_their_error_and_to_the_batch() -> None:
    rows = _rows()
    found = [*decode_table(table_from_bytes(_shard(rows, WITH), "d"))]
    for row, read in zip(rows, found, strict=True):
        wanted = np.maximum(row.targets.written_logprob_N, -0xFFFF / 1024)  # type: ignore[type-var]
        np.testing.assert_allclose(read.targets.written_logprob_N, wanted, atol=1 / 2048, rtol=0)
        assert read.targets.written_logprob_N.dtype == np.float32  # type: ignore[union-attr]
    batch = collate(found, temperature=1.0)
    assert batch.written_logprob_N is not None
    assert batch.written_logprob_N.shape == batch.label_logprob_N.shape
    assert batch.to("cpu").written_logprob_N is not None


def test_without_them_a_shard_is_as_it_was() -> None:
    rows, spec = _rows(), CodecSpec(500)
    assert _shard(rows, spec) == _shard(sample_rows(4, 0)[0], spec)
    assert "written_logprobs" not in spec.to_json()
    assert CodecSpec.from_json(WITH.to_json()) == WITH
    found = [*decode_table(table_from_bytes(_shard(rows, spec), "d"))]
    assert collate(found, temperature=1.0).written_logprob_N is None
    with pytest.raises(CacheError, match="without the log-probs of its writer"):
        _shard(sample_rows(4, 0)[0], WITH)


def test_they_are_copied_without_decoding_and_survive_fewer_entries() -> None:
    rows = _rows()
    data, table = _shard(rows, WITH), table_from_bytes(_shard(rows, WITH), "d")
    moved = encode_table([table], split="train", index=0, identity_digest="e")[1]
    assert moved == _shard(rows, WITH, "e")
    less = encode_table(
        [table, table], split="train", index=0, identity_digest="d", limit=EntryLimit(top_k=2)
    )[1]
    one = [row.targets.written_logprob_N for row in decode_table(table_from_bytes(data, "d"))]
    two = [row.targets.written_logprob_N for row in decode_table(table_from_bytes(less, "d"))]
    for wanted, found in zip(one * 2, two, strict=True):
        np.testing.assert_array_equal(wanted, found)


def test_a_sampled_cache_has_them_too() -> None:
    spec = CodecSpec(500, RULES[1], written_logprobs=True)
    rows, tails = sampled_rows(3, 1, RULES[1])
    rows = [
        replace(row, targets=replace(row.targets, written_logprob_N=row.targets.label_logprob_N))
        for row in rows
    ]
    data = encode_shard(
        rows, spec, split="train", index=0, temperatures=GRID, identity_digest="d", tails=tails
    )[1]
    for row, read in zip(rows, decode_table(table_from_bytes(data, "d")), strict=True):
        np.testing.assert_allclose(
            read.targets.written_logprob_N, row.targets.label_logprob_N, atol=1 / 2048, rtol=0
        )


def test_a_damaged_column_is_rejected() -> None:
    table = table_from_bytes(_shard(_rows(), WITH), "d")
    place = table.schema.get_field_index("written_logprob_high")
    cut = [value.as_py()[:-1] for value in table.column(place)]
    spoiled = table.set_column(place, table.schema.field(place), [cut])
    with pytest.raises(CacheError, match="column written_logprob_high of row 0 holds"):
        [*decode_table(spoiled)]
