"""Merged caches: parts of one to the same bytes, several to all their rows."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.io.finalize import finalize
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.writer import commit_shard, encode_shard
from pipeline.cache.layout.fold import reopen
from pipeline.cache.layout.names import SegmentName
from pipeline.cache.layout.recorded import Recorded
from pipeline.cache.layout.records import ShardRecord
from pipeline.cache.tools import merge_partial
from pipeline.cache.tools.verify import verify_cache
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store
from tests.conftest import digests
from tests.unit.cache.planned_cache import flip, lose, write_planned_cache
from tests.unit.cache.sample_cache import (
    SHARD,
    SPEC,
    TEMPERATURES,
    finish,
    read_all,
    sample_identity,
    sample_rows,
)
from tests.unit.storage import conftest as storage_fixtures

s3_endpoint = storage_fixtures.s3_endpoint
bucket = storage_fixtures.bucket


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    write_planned_cache(str(tmp_path / "whole"))
    return tmp_path / "whole"


def _part(whole: Path, target: Path, *lost: tuple[str, int]) -> Path:
    """Copy a cache as a worker leaves it that has not written these shards."""
    shutil.copytree(whole, target)
    lose(target, *lost)
    return target


def _merge(target: Path | str, *sources: Path | str) -> int:
    return main(["merge", *map(str, sources), str(target)])


def _but_card(folder: Path) -> dict[str, str]:
    return {k: v for k, v in digests(folder).items() if k != "README.md"}


def test_parts_of_one_cache_become_it(whole: Path, tmp_path: Path) -> None:
    one = _part(whole, tmp_path / "one", ("train", 1))
    two = _part(whole, tmp_path / "two", ("train", 0), ("heldout", 0))
    before = digests(one), digests(two)
    assert _merge(tmp_path / "sum", one, two) == 0
    assert verify_cache(Store(str(tmp_path / "sum"))) == []
    found, wanted = _but_card(tmp_path / "sum"), _but_card(whole)
    # Neither part knew the corpus's counts, which only the manifest tells people.
    assert {k for k in wanted if found[k] != wanted[k]} <= {"_meta/manifest.json"}
    assert (digests(one), digests(two)) == before
    # With a part that has a manifest they are known; if damaged, the other part replaces it.
    flip(whole / SHARD, 50)
    assert _merge(tmp_path / "again", whole, two) == 0
    assert _but_card(tmp_path / "again") == wanted


def test_parts_are_copied_by_as_many_workers_as_are_asked_for(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = _part(whole, tmp_path / "two", ("train", 0))
    together = threading.Barrier(2)
    shards: list[str] = []
    blocks: list[Any] = []
    read_shard, read_block = merge_partial.read_shard, merge_partial.read_block

    def watched_shard(store: Store, record: ShardRecord) -> bytes:
        shards.append(record.path)
        if record.split == "train":
            together.wait(20)
        return read_shard(store, record)

    def slow_block(store: Store, block: SegmentName, recorded: Recorded) -> Any:
        blocks.append((store.url, block))
        time.sleep(0.2)
        return read_block(store, block, recorded)

    monkeypatch.setattr(merge_partial, "read_shard", watched_shard)
    monkeypatch.setattr(merge_partial, "read_block", slow_block)
    assert _merge(tmp_path / "sum", whole, two, "--workers", "2") == 0
    assert _but_card(tmp_path / "sum") == _but_card(whole)
    assert len(shards) == 3
    assert len(blocks) == len(set(blocks)) == 2, "one worker reads a block, the other waits"


def test_what_is_missing_is_named_and_the_same_command_goes_on(whole: Path, tmp_path: Path) -> None:
    one = _part(whole, tmp_path / "one", ("train", 1), ("heldout", 0))
    two = _part(whole, tmp_path / "two", ("train", 0), ("heldout", 0))
    with pytest.raises(CacheError, match=r"2 of 3 shards are there; .* intact heldout-00000"):
        _merge(tmp_path / "sum", one, two)
    assert not (tmp_path / "sum/_meta/manifest.json").exists()
    three = _part(whole, tmp_path / "three", ("train", 0), ("train", 1))
    assert _merge(tmp_path / "sum", one, two, three) == 0
    assert verify_cache(Store(str(tmp_path / "sum"))) == []


def test_one_identity_and_other_bytes(whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    rows, tails = sample_rows(3, seed=77)
    record, data = encode_shard(
        rows, SPEC, split="train", index=1, temperatures=TEMPERATURES,
        identity_digest=fingerprint(sample_identity()), tails=tails,
    )  # fmt: skip
    lose(other)
    commit_shard(Store(str(other)), record, data)
    with pytest.raises(CacheError, match=f"different shards:\n.*{SHARD}"):
        _merge(tmp_path / "sum", whole, other)
    assert not (tmp_path / "sum").exists()


def _write(
    folder: Path,
    train: list[int],
    heldout: list[int],
    spec: CodecSpec = SPEC,
    **changes: Any,
) -> Path:
    """Write a cache whose rows are those of these seeds."""
    identity = sample_identity(**changes)
    store, records = Store(str(folder)), []
    for split, seeds in (("train", train), ("heldout", heldout)):
        if seeds:
            made = [sample_rows(1, seed=seed) for seed in seeds]
            record, data = encode_shard(
                [rows[0] for rows, _ in made], spec, split=split, index=0,
                temperatures=TEMPERATURES, identity_digest=fingerprint(identity),
                tails=[tails[0] for _, tails in made],
            )  # fmt: skip
            commit_shard(store, record, data)
            records.append(record)
    finish(store, records, identity)
    if spec != SPEC:
        finalize(
            store, Counter(r.split for r in records),
            identity=identity, spec=spec, temperatures=TEMPERATURES,
            corpus_counts={}, tokenizer_files=["tokenizer.json"], command="",
        )  # fmt: skip
    return folder


def _teacher(name: str) -> dict[str, Any]:
    return {**sample_identity()["teacher"], "model": name}


def test_the_longest_sample_of_all_sources_bounds_the_merged_cache(tmp_path: Path) -> None:
    """A student's `max_length` is checked against it."""
    parts = [
        _write(tmp_path / name, [seed], [], teacher=_teacher(name),
               corpus={"source": "random", "max_length": length})
        for name, seed, length in (("A", 1, 9), ("B", 2, 40), ("C", 3, 12))
    ]  # fmt: skip
    assert _merge(tmp_path / "sum", *parts) == 0
    assert open_cache(str(tmp_path / "sum")).manifest.identity["corpus"]["max_length"] == 40


def test_several_teachers(tmp_path: Path) -> None:
    one = _write(tmp_path / "1", [1, 2], [3], teacher=_teacher("A"))
    two = _write(
        tmp_path / "2", [4], [5, 6], teacher=_teacher("B"),
        corpus={"source": "mathematics", "max_length": 9},
    )  # fmt: skip
    before = digests(one), digests(two)
    assert _merge(tmp_path / "sum", one, two) == 0
    assert verify_cache(Store(str(tmp_path / "sum"))) == []
    merged = open_cache(str(tmp_path / "sum"))
    identity = merged.manifest.identity
    assert identity["teacher"]["model"] == "A + B"
    assert identity["corpus"] == {"source": "random + mathematics", "max_length": 9}
    sources = [open_cache(str(folder)).manifest.identity_digest for folder in (one, two)]
    assert identity["derived"] == {"from": sources, "how": {"command": "merge"}}
    for split in ("train", "heldout"):
        rows = [row for folder in (one, two) for row in _split_rows(folder, split)]
        got = _split_rows(tmp_path / "sum", split)
        assert [row.sample_id for row in got] == [row.sample_id for row in rows]
        for a, b in zip(got, rows, strict=True):
            assert a.targets.logprobs_E.tolist() == b.targets.logprobs_E.tolist()
    whole = digests(tmp_path / "sum")
    lose(tmp_path / "sum", ("train", 1))
    assert _merge(tmp_path / "sum", one, two) == 0
    assert digests(tmp_path / "sum") == whole
    assert (digests(one), digests(two)) == before


def _split_rows(folder: Path, split: str) -> list[Any]:
    source = open_cache(str(folder)).source(split)
    return [r for s, n in enumerate(source.shard_rows()) for r in source.read_rows(s, range(n))]


def test_two_teachers_on_the_same_samples(tmp_path: Path) -> None:
    one = _write(tmp_path / "1", [1, 2], [3], teacher=_teacher("A"))
    two = _write(tmp_path / "2", [2, 1, 4], [3], teacher=_teacher("B"))
    assert _merge(tmp_path / "sum", one, two) == 0
    assert verify_cache(Store(str(tmp_path / "sum"))) == []
    derived = open_cache(str(tmp_path / "sum")).manifest.identity["derived"]
    assert derived["repeated_samples"] == 3


def test_held_out_here_and_trained_on_there(tmp_path: Path) -> None:
    one = _write(tmp_path / "1", [1, 2], [3], teacher=_teacher("A"))
    two = _write(tmp_path / "2", [3, 4], [1, 5], teacher=_teacher("B"))
    with pytest.raises(CacheError, match="2 samples are held out in one cache and trained on"):
        _merge(tmp_path / "sum", one, two)
    assert not (tmp_path / "sum").exists()


def test_all_that_differs_is_named_at_once(tmp_path: Path) -> None:
    one = _write(tmp_path / "1", [1], [], teacher=_teacher("A"))
    scheme = {**sample_identity()["scheme"], "top_k": 4}
    two = _write(
        tmp_path / "2", [2], [], spec=CodecSpec(vocab_size=600),
        tokenizer={"vocabulary_sha256": "1" * 64, "size": 500}, scheme=scheme,
    )  # fmt: skip
    three = _part(tmp_path / "1", tmp_path / "3")
    plan = {"identity": sample_identity(shard_tokens=9), "shards": []}
    plan["identity_digest"] = fingerprint(plan["identity"])
    (three / "_meta/plan.json").write_text(json.dumps(plan, indent=1))
    with pytest.raises(CacheError) as error:
        _merge(tmp_path / "sum", one, two, three)
    text = str(error.value)
    for said in (
        "codec.vocab_size: 600 there, 500", "tokenizer.vocabulary_sha256", "scheme.top_k: 4",
        f"{three}: the cache is incomplete",
    ):  # fmt: skip
        assert said in text
    assert not (tmp_path / "sum").exists()


def test_targets_and_sources_that_do_not_go(whole: Path, tmp_path: Path) -> None:
    other = _write(tmp_path / "other", [31], [], shard_tokens=33)
    source = digests(whole)
    for arguments, says in (
        ((whole, whole, other), "apart from the sources"),
        ((tmp_path / "sum", whole, whole), "named twice"),
        ((tmp_path / "sum", whole, tmp_path / "none"), "no cache there"),
    ):
        with pytest.raises(CacheError, match=says):
            _merge(*arguments)
    shutil.copytree(other, tmp_path / "taken")
    with pytest.raises(CacheError, match="holds another cache"):
        _merge(tmp_path / "taken", whole, _part(whole, tmp_path / "p", ("train", 1)))
    assert digests(whole) == source
    assert digests(tmp_path / "taken") == digests(other)


def test_from_disk_and_s3_to_s3(bucket: str, whole: Path, tmp_path: Path) -> None:
    remote = f"s3://{bucket}/parts/one"
    write_planned_cache(remote)
    store = Store(remote)
    assert reopen(store, [("train", 1)]) == (("train", 1),)
    store.delete(SHARD)
    target = f"s3://{bucket}/sum"
    assert _merge(target, remote, whole) == 0
    assert verify_cache(Store(target), workers=2) == []
    assert Store(target).read("_meta/manifest.json") == (whole / "_meta/manifest.json").read_bytes()
    assert main(["slice", target, f"s3://{bucket}/few", "--samples", "4"]) == 0
    assert len(read_all(open_cache(f"s3://{bucket}/few"))) == 4
    for name in ("inspect", "stats"):
        assert main([name, target]) == 0
