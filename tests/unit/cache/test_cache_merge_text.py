"""Parts of one cache are merged where they are made from one text, which goes along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.writer import commit_shard, encode_shard
from pipeline.cache.layout.names import PLAN, RESPONSE_PLAN, RESPONSE_UNITS, RESPONSES
from pipeline.cache.layout.quarantine import QuarantinedRow, quarantine_rows
from pipeline.cache.tools.verify import verify_cache
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.teacher.generation.base import Written
from pipeline.teacher.generation.files import ResponseText, encode_responses
from tests.conftest import digests
from tests.unit.cache.planned_cache import flip, lose, plan_as_stage_one, write_planned_cache
from tests.unit.cache.sample_cache import (
    SPEC,
    TEMPERATURES,
    rewrite_manifest,
    sample_identity,
    sample_rows,
)

FILE = f"{RESPONSES}/00000.parquet"


@pytest.fixture
def one(tmp_path: Path) -> Path:
    write_planned_cache(str(tmp_path / "one"))
    return tmp_path / "one"


@pytest.fixture
def two(one: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one, tmp_path / "two"))


def _merge(target: Path, *sources: Path) -> int:
    return main(["merge", *map(str, sources), str(target)])


def _respond(
    folder: Path, index: int, tokens: Sequence[Sequence[int]], *, text: str = "answer"
) -> None:
    """Write a file of responses; no tokens: the teacher could not write that one."""
    written = [
        Written(np.array(ids, np.int32), None) if ids else QuarantinedRow(f"r{n}", "no", 3)
        for n, ids in enumerate(tokens)
    ]
    texts = [
        ResponseText(f"r{n}", "train", "?", text, ids[-1:] == [2]) for n, ids in enumerate(tokens)
    ]
    data = encode_responses(texts, written, identity_digest="d", prompts="p")
    Store(str(folder)).write(f"{RESPONSES}/{index:05d}.parquet", data)


def _plan(folder: Path, **numbers: object) -> None:
    identity = sample_identity()
    data = {"identity": identity, "identity_digest": fingerprint(identity), **numbers}
    Store(str(folder)).write(RESPONSE_PLAN, json.dumps(data, indent=1).encode())


def _refused(tmp_path: Path, *sources: Path) -> str:
    with pytest.raises(CacheError, match="made from different texts") as error:
        _merge(tmp_path / "sum", *sources)
    assert error.value.expected == "parts of one cache, made from one text"
    assert "merge only those of one text" in (error.value.do or "")
    assert not (tmp_path / "sum").exists()
    return error.value.found


def test_two_complete_caches_of_other_texts(one: Path, two: Path, tmp_path: Path) -> None:
    rewrite_manifest(one, corpus_content="a" * 64)
    assert _merge(tmp_path / "unknown", one, two) == 0
    rewrite_manifest(two, corpus_content="b" * 64)
    assert f"{two}/_meta/manifest.json: text {'b' * 12}" in _refused(tmp_path, one, two)


def test_parts_with_other_numbers_of_shards(one: Path, two: Path, tmp_path: Path) -> None:
    plan_as_stage_one(one)
    lose(two, ("train", 1))
    plan_as_stage_one(two, is_known=False)
    assert _merge(tmp_path / "unknown", one, two) == 0
    plan = json.loads((one / PLAN).read_text())
    (two / PLAN).write_text(json.dumps({**plan, "shards": {"train": 3, "heldout": 1}}, indent=1))
    found = _refused(tmp_path, one, two)
    assert "_meta/plan.json: 2 shards of train and 1 shards of heldout; " in found
    assert f"{two}/_meta/plan.json: 3 shards of train" in found


def test_a_shard_made_from_two_texts(one: Path, tmp_path: Path) -> None:
    """With a quarantined row in one of them, the numbers of rows alone do not tell."""
    parts = []
    for name, source, left_out in (("a", "1" * 32, 0), ("b", "1" * 32, 1), ("c", "2" * 32, 1)):
        folder = Path(shutil.copytree(one, tmp_path / name))
        plan_as_stage_one(folder)
        lose(folder, ("train", 1))
        rows, tails = sample_rows(3, seed=1)
        kept = slice(left_out, None)
        record, data = encode_shard(
            rows[kept], SPEC, split="train", index=1, temperatures=TEMPERATURES,
            identity_digest=fingerprint(sample_identity()), tails=tails[kept],
            source_xxh3_128=source, rows_quarantined=left_out,
        )  # fmt: skip
        store = Store(str(folder))
        if left_out:
            quarantine_rows(store, "train-00001", [QuarantinedRow(rows[0].sample_id, "no", 3)])
        commit_shard(store, record, data)
        parts.append(folder)
    assert _merge(tmp_path / "sum", *parts[:2]) == 0
    with pytest.raises(CacheError, match="hold different shards"):
        _merge(tmp_path / "none", parts[0], parts[2])


def test_responses_with_other_tokens(one: Path, two: Path, tmp_path: Path) -> None:
    _respond(one, 0, [[5, 6, 2]])
    _respond(two, 0, [[5, 7, 2]])
    for folder in (one, two):
        _plan(folder)
        lose(folder, ("train", folder == two))
    assert _refused(tmp_path, one, two) == (
        "caches of one identity are made from different texts:\n"
        f"  - {one}/{FILE} and {two}/{FILE}: other responses\n"
    )
    # A damaged file says nothing; what an earlier call of the command took does.
    flip(two / FILE, 60)
    assert _merge(tmp_path / "sum", one, two) == 0
    _respond(two, 0, [[5, 7, 2]])
    with pytest.raises(CacheError, match=r"sum/_meta/responses/00000.parquet and .*: other"):
        _merge(tmp_path / "sum", two)


def test_stage_ones_settings_go_along(one: Path, two: Path, tmp_path: Path) -> None:
    """Tau fitted again, on another device, might make another identity."""
    (one / "_meta/config.yaml").unlink()
    (two / "_meta/fitted_tau.json").write_text("{}")
    assert _merge(tmp_path / "sum", one, two) == 0
    for name in ("config.yaml", "fitted_tau.json"):
        assert (tmp_path / "sum/_meta" / name).read_bytes() == (two / "_meta" / name).read_bytes()


def test_other_numbers_of_files_of_responses(one: Path, two: Path, tmp_path: Path) -> None:
    _plan(one, shards=4)
    _plan(two, shards=5)
    assert f"{two}/{RESPONSE_PLAN}: 5 files of responses" in _refused(tmp_path, one, two)


def test_the_intact_responses_and_the_finished_plan_are_taken(
    one: Path, two: Path, tmp_path: Path
) -> None:
    for folder in (one, two):
        _respond(folder, 0, [[5, 6, 2], []])
        _respond(folder, 1, [[5, 6, 7]], text=f"by {folder.name}")
        _plan(folder, **({"shards": 2, "prompt_counts": {"rows": 9}} if folder == two else {}))
    shutil.copy(two / FILE, one / RESPONSES / "00002.parquet")  # which was not planned
    flip(one / FILE, 60)
    lose(one, ("train", 0))
    lose(two, ("train", 1))
    for unit in ("00000", "00001"):
        for name in (f"tokens/{unit}-0.parquet", f"summaries/{unit}.json"):
            Store(str(two)).write(f"{RESPONSE_UNITS}/{name}", name.encode())
    # Fewer units, which do not go with those of the other.
    Store(str(one)).write(f"{RESPONSE_UNITS}/tokens/00000-0.parquet", b"other")
    Store(str(one)).write(f"{RESPONSE_UNITS}/summaries/00000.json", b"other")
    for corpus in ("one", "two"):
        for name in ("corpus.json", "summaries/00000-00255.jsonl.zst", "tokens/00000-0.parquet"):
            Store(str(tmp_path / corpus)).write(f"_meta/corpus/{corpus}/{name}", name.encode())
    target = tmp_path / "sum"
    assert _merge(target, one, two) == 0
    found, of_two = digests(target), digests(two)
    wanted = {name: of_two[name] for name in of_two if name.startswith(RESPONSES)}
    wanted[f"{RESPONSES}/00001.parquet"] = digests(one)[f"{RESPONSES}/00001.parquet"]
    assert {name: found[name] for name in found if name.startswith(RESPONSES)} == wanted
    for folder in (one, two):
        name = f"_meta/corpus/{folder.name}"
        assert digests(target / name) == digests(folder / name)
    assert open_cache(str(target)).manifest.corpus_counts == {
        "rows": 9, "samples": 10, "train": 8, "heldout": 2, "tokens": 257, "loss_tokens": 121,
        "responses": 2, "responses_unfinished": 1, "responses_quarantined": 1,
    }  # fmt: skip
    assert verify_cache(Store(str(target))) == []
    times = {file: file.stat().st_mtime_ns for file in (target / RESPONSES).rglob("*")}
    assert _merge(target, one, two) == 0
    assert {file: file.stat().st_mtime_ns for file in times} == times
    # Of an earlier call that was killed: its damaged file is replaced, its units are completed.
    flip(target / FILE, 60)
    (target / RESPONSE_UNITS / "summaries/00001.json").unlink()
    assert _merge(target, one, two) == 0
    assert digests(target) == found
