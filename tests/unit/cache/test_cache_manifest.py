"""A cache from shards to manifest and back; what is missing, foreign, newer or damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.io.finalize import finalize
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.writer import commit_shard, encode_shard
from pipeline.cache.layout.card import responses_text
from pipeline.cache.layout.manifest import Manifest, describe_difference
from pipeline.config import fingerprint
from pipeline.errors import CacheError, DistillError
from pipeline.storage import Store
from pipeline.teacher.generation.settings import GenerateSettings
from tests.unit.cache.planned_cache import SEGMENT, lose
from tests.unit.cache.sample_cache import (
    SHARD,
    SIZES,
    SPEC,
    TEMPERATURES,
    finish,
    read_all,
    rewrite_manifest,
    sample_identity,
    sample_rows,
    sample_shard,
    write_cache,
)


def test_a_shard_is_the_same_bytes_every_time() -> None:
    one, two = (sample_shard("train", 0, 5) for _ in "ab")
    assert one == two
    code = (
        "from tests.unit.cache.sample_cache import sample_shard;"
        "print(sample_shard('train', 0, 5)[0].xxh3_128)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "11"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env
    )
    assert done.stdout.strip() == one[0].xxh3_128


def test_what_was_written_is_read(made: Path) -> None:
    cache = open_cache(str(made))
    assert cache.manifest.identity == sample_identity()
    assert cache.manifest.temperatures == TEMPERATURES
    for split, index, number in SIZES:
        rows, _ = sample_rows(number, seed=100 * (split == "heldout") + index)
        source = cache.source(split)
        got = source.read_rows(index, range(number))
        starts = sum(n for s, i, n in SIZES if s == split and i < index)
        lengths = source.lengths()[starts : starts + number].tolist()
        assert lengths == [row.input_ids_L.size for row in rows]
        counts = source.loss_token_counts()[starts : starts + number].tolist()
        assert counts == [row.targets.num_positions for row in rows]
        for a, b in zip(rows, got, strict=True):
            assert a.sample_id == b.sample_id
            assert a.input_ids_L.tolist() == b.input_ids_L.tolist()
            assert a.loss_mask_L.tolist() == b.loss_mask_L.tolist()
            assert a.targets.token_ids_E.tolist() == b.targets.token_ids_E.tolist()
            assert b.targets.temperatures == TEMPERATURES
            half = SPEC.quantisation.log_z_step / 2
            np.testing.assert_allclose(a.targets.log_z_NG, b.targets.log_z_NG, atol=1.01 * half)
            half = SPEC.quantisation.entropy_step / 2
            np.testing.assert_allclose(a.targets.entropy_NG, b.targets.entropy_NG, atol=1.01 * half)
            for name in ("label_logprob_N", "logprobs_E"):
                x, y = getattr(a.targets, name), getattr(b.targets, name)
                np.testing.assert_allclose(np.exp(x), np.exp(y), atol=0.03)
                assert x.shape == y.shape


def test_rows_come_in_the_order_asked_for(made: Path) -> None:
    source = open_cache(str(made)).source("train")
    every = [row.sample_id for row in source.read_rows(0, range(5))]
    picked = source.read_rows(0, [3, 0, 3])
    assert [row.sample_id for row in picked] == [every[3], every[0], every[3]]
    assert source.read_rows(1, []) == []


def test_record_counts_its_shard(made: Path) -> None:
    records = open_cache(str(made)).records()
    for record, (split, index, number) in zip(records, SIZES, strict=True):
        rows, tails = sample_rows(number, seed=100 * (split == "heldout") + index)
        assert (record.split, record.index, record.rows) == (split, index, number)
        assert record.tokens == sum(row.input_ids_L.size for row in rows)
        assert record.loss_tokens == sum(row.targets.num_positions for row in rows)
        assert record.entries == sum(row.targets.token_ids_E.size for row in rows)
        assert record.bytes == (made / record.path).stat().st_size
        assert record.kept_mass == pytest.approx(1 - np.concatenate(tails).mean(), abs=0.01)
        entropy = np.concatenate([row.targets.entropy_NG[:, 0] for row in rows])
        assert record.entropy == pytest.approx(entropy.mean(), abs=0.1)


def test_missing_manifest_names_the_missing_shards(cache_dir: Path) -> None:
    url = str(cache_dir)
    lose(cache_dir, ("train", 1))
    with pytest.raises(CacheError, match=r"no cache there .no _meta/manifest.json"):
        open_cache(url)
    shards = [{"split": s, "index": i} for s, i, _ in [*SIZES, ("heldout", 1, 0)]]
    (cache_dir / "_meta/plan.json").write_text(json.dumps({"shards": shards}))
    with pytest.raises(CacheError, match="2 of 4 shards missing: train-00001, heldout-00001"):
        open_cache(url)
    (cache_dir / "_meta/plan.json").write_text('{"shards": [{"splat": "train"}]}')
    with pytest.raises(CacheError, match="incomplete"):
        open_cache(url)
    with pytest.raises(CacheError, match="no cache there"):
        open_cache(str(cache_dir / "nothing"))


def test_newer_format_is_refused_with_what_to_do(cache_dir: Path) -> None:
    rewrite_manifest(cache_dir, later_field=3)
    assert len(read_all(open_cache(str(cache_dir)))) == 10
    rewrite_manifest(cache_dir, format_version=3, shards="of another shape")
    with pytest.raises(CacheError, match="format version 3; expected at most 1; upgrade"):
        open_cache(str(cache_dir))


def test_other_json_in_the_manifests_place_is_refused(cache_dir: Path) -> None:
    for text in ("[]", "3", "null", '{"manifest_sha256": 3}', "\x00", "{"):
        (cache_dir / "_meta/manifest.json").write_text(text)
        with pytest.raises(CacheError, match="damaged"):
            open_cache(str(cache_dir))
    data = {"format": "something else"}
    _rewrite = {**data, "manifest_sha256": fingerprint(data)}
    (cache_dir / "_meta/manifest.json").write_text(json.dumps(_rewrite))
    with pytest.raises(CacheError, match="damaged"):
        open_cache(str(cache_dir))


def test_what_no_reader_could_read_is_not_written() -> None:
    rows, tails = sample_rows(1, seed=5)
    row, targets = rows[0], rows[0].targets
    assert targets.num_positions > 1

    def encode(row: Any, tail: Any) -> None:
        encode_shard(
            [row], SPEC, split="train", index=0, temperatures=TEMPERATURES,
            identity_digest="0", tails=[tail],
        )  # fmt: skip

    encode(row, tails[0])
    first = row.loss_mask_L.copy()
    first[np.flatnonzero(first)[0]], first[0] = False, True
    for wrong, tail, says in (
        (row, tails[0][:-1], "differ in length"),
        (replace(row, loss_mask_L=first), tails[0], "do not match its supervised tokens"),
        (replace(row, loss_mask_L=row.loss_mask_L & False), tails[0], "do not match"),
        (replace(row, targets=replace(targets, temperatures=(1.0, 3.0))), tails[0], "grid"),
        (
            replace(row, targets=replace(targets, label_logprob_N=targets.label_logprob_N[1:])),
            tails[0],
            "differ in length",
        ),
        (
            replace(row, targets=replace(targets, log_z_NG=targets.log_z_NG[:, :1])),
            tails[0],
            "differ in length",
        ),
    ):
        with pytest.raises(CacheError, match=says):
            encode(wrong, tail)


def test_a_cache_without_training_rows_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    record, data = sample_shard("heldout", 0, 2)
    commit_shard(store, record, data)
    with pytest.raises(CacheError, match="no training rows"):
        finish(store, [record], sample_identity())
    assert not store.exists("_meta/manifest.json")
    identity = sample_identity()
    generate = GenerateSettings(enabled=True, prompts="heldout").identity()
    scoring = {**identity, "corpus": {**identity["corpus"], "generate": generate}}
    counts = {"responses": 2, "responses_unfinished": 1, "loss_tokens": 9}
    manifest = finish(store, [record], scoring)
    assert manifest.of_split("heldout")
    assert "written by the teacher itself (temperature 1, seed 5)" in str(
        responses_text({"corpus": {"generate": generate, "seed": 5}}, counts)
    )
    writer = {"model": "student", "revision": "sha256:1"}
    said = responses_text(
        {"corpus": {"generate": {**generate, "writer": writer, "seed": 7}}}, counts
    )
    assert "written by `student` (sha256:1) (temperature 1, seed 7): 2 responses" in str(said)
    store.delete("_meta/manifest.json")
    commit_shard(store, *sample_shard("train", 0, 2))
    with pytest.raises(CacheError, match="a tokenizer file is missing"):
        finalize(
            store, {"train": 1}, identity=sample_identity(), spec=SPEC, temperatures=TEMPERATURES,
            corpus_counts={}, tokenizer_files=["gone.json"], command="",
        )  # fmt: skip


def test_finalize_writes_the_same_bytes_again(cache_dir: Path) -> None:
    names = ["_meta/manifest.json", SEGMENT, "README.md"]
    before = [(cache_dir / name).read_bytes() for name in names]
    (cache_dir / names[0]).unlink()
    write_cache(str(cache_dir))
    assert [(cache_dir / name).read_bytes() for name in names] == before


def test_cache_on_memory_store() -> None:
    url = "memory://whole/cache"
    write_cache(url)
    assert len(read_all(open_cache(url))) == 10
    Store(url).write(SHARD, b"PAR1")
    with pytest.raises(CacheError, match=r"memory://whole/cache/data/train/00001.parquet"):
        read_all(open_cache(url))


def test_describe_difference_names_fields() -> None:
    there = sample_identity(corpus={"source": "a", "seed": 1}, shard_tokens=8)
    asked = sample_identity(corpus={"source": "b", "seed": 1}, extra=None)
    text = describe_difference(there, asked)
    assert "corpus.source: a there, b asked for" in text
    assert "shard_tokens: 8 there, 32 asked for" in text
    assert "seed" not in text
    assert describe_difference(there, there) == ""
    many = describe_difference({}, {f"field{i}": i for i in range(9)})
    assert "field0: nothing there, 0 asked for" in many
    assert many.endswith(" and 4 more")
    assert len(describe_difference({"a": "x" * 500}, {})) < 100


def test_threads_read_the_same_rows(made: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    source = open_cache(str(made)).source("train")
    wanted = {shard: [r.sample_id for r in source.read_rows(shard, range(3))] for shard in (0, 1)}

    def read(number: int) -> bool:
        shard = number % 2
        return [r.sample_id for r in source.read_rows(shard, range(3))] == wanted[shard]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(40)))


def test_errors_are_ours(made: Path) -> None:
    assert issubclass(CacheError, DistillError)
    assert isinstance(open_cache(str(made)).manifest, Manifest)
