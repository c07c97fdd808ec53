"""A cache from shards to manifest and back; what is missing, foreign, newer or damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cache.__main__ import main as cache_command
from pipeline.cache.manifest import Manifest, ShardRecord, describe_difference, record_name
from pipeline.cache.reader import Cache, open_cache
from pipeline.cache.writer import commit_shard, encode_shard, finalize, intact_record
from pipeline.config import fingerprint
from pipeline.errors import CacheError, ConfigError, DistillError, run_command
from pipeline.storage import Store
from tests.unit.cache.sample_cache import (
    SIZES,
    SPEC,
    TEMPERATURES,
    finish,
    sample_identity,
    sample_rows,
    sample_shard,
    write_cache,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "cache"
    write_cache(str(folder))
    return folder


@pytest.fixture
def cache_dir(made: Path, tmp_path: Path) -> Path:
    """Return a copy that the test may damage."""
    return Path(shutil.copytree(made, tmp_path / "cache"))


def _read_all(cache: Cache) -> list[Any]:
    return [
        row
        for split in ("train", "heldout")
        for shard, rows in enumerate(cache.source(split).shard_rows())
        for row in cache.source(split).read_rows(shard, range(rows))
    ]


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
        counts = source.counted_counts()[starts : starts + number].tolist()
        assert counts == [row.targets.num_positions for row in rows]
        for a, b in zip(rows, got, strict=True):
            assert a.sample_id == b.sample_id
            assert a.input_ids_L.tolist() == b.input_ids_L.tolist()
            assert a.counted_L.tolist() == b.counted_L.tolist()
            assert a.targets.token_ids_E.tolist() == b.targets.token_ids_E.tolist()
            assert b.targets.temperatures == TEMPERATURES
            for name in ("log_z_NG", "entropy_NG", "gold_logprob_N"):
                x, y = getattr(a.targets, name), getattr(b.targets, name)
                np.testing.assert_allclose(x, y, rtol=2**-10, atol=1e-6)
                assert x.shape == y.shape
            error = np.abs(a.targets.logprobs_E - b.targets.logprobs_E)
            assert error.max(initial=0) <= 1.5 * SPEC.step_nats


def test_rows_come_in_the_order_asked_for(made: Path) -> None:
    source = open_cache(str(made)).source("train")
    every = [row.sample_id for row in source.read_rows(0, range(5))]
    picked = source.read_rows(0, [3, 0, 3])
    assert [row.sample_id for row in picked] == [every[3], every[0], every[3]]
    assert source.read_rows(1, []) == []


def test_record_counts_its_shard(made: Path) -> None:
    manifest = open_cache(str(made)).manifest
    for record, (split, index, number) in zip(manifest.shards, SIZES, strict=True):
        rows, tails = sample_rows(number, seed=100 * (split == "heldout") + index)
        assert (record.split, record.index, record.rows) == (split, index, number)
        assert record.tokens == sum(row.input_ids_L.size for row in rows)
        assert record.counted == sum(row.targets.num_positions for row in rows)
        assert record.entries == sum(row.targets.token_ids_E.size for row in rows)
        assert record.bytes == (made / record.path).stat().st_size
        assert record.kept_mass == pytest.approx(1 - np.concatenate(tails).mean(), abs=1e-6)
        entropy = np.concatenate([row.targets.entropy_NG[:, 0] for row in rows])
        assert record.entropy == pytest.approx(entropy.mean(), abs=1e-6)


def test_missing_manifest_names_the_missing_shards(cache_dir: Path) -> None:
    url = str(cache_dir)
    (cache_dir / "_meta/manifest.json").unlink()
    with pytest.raises(CacheError, match=r"no cache there .no _meta/manifest.json"):
        open_cache(url)
    shards = [{"split": s, "index": i} for s, i, _ in [*SIZES, ("heldout", 1, 0)]]
    (cache_dir / "_meta/plan.json").write_text(json.dumps({"shards": shards}))
    (cache_dir / "_meta/shards/train-00001.json").unlink()
    with pytest.raises(CacheError, match="2 of 4 shards missing: train/00001, heldout/00001"):
        open_cache(url)
    (cache_dir / "_meta/plan.json").write_text('{"shards": [{"splat": "train"}]}')
    with pytest.raises(CacheError, match="incomplete"):
        open_cache(url)
    with pytest.raises(CacheError, match="no cache there"):
        open_cache(str(cache_dir / "nothing"))


def _rewrite_manifest(folder: Path, **changes: Any) -> None:
    file = folder / "_meta/manifest.json"
    data = {**json.loads(file.read_text()), **changes}
    del data["manifest_sha256"]
    data["manifest_sha256"] = fingerprint(data)
    file.write_text(json.dumps(data))


def test_newer_format_is_refused_with_what_to_do(cache_dir: Path) -> None:
    _rewrite_manifest(cache_dir, later_field=3)
    assert len(_read_all(open_cache(str(cache_dir)))) == 10
    _rewrite_manifest(cache_dir, format_version=2, shards="of another shape")
    with pytest.raises(CacheError, match="format version 2; expected at most 1; upgrade"):
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


def _flip(file: Path, at: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(bytes(data))


def _header(file: Path) -> int:
    return 1


def _data_page(file: Path) -> int:
    chunk = pq.ParquetFile(file).metadata.row_group(0).column(5)
    assert chunk.path_in_schema == "entries"
    return chunk.data_page_offset + chunk.total_compressed_size - 3


def _footer_at(file: Path) -> int:
    size = file.stat().st_size
    length = int.from_bytes(file.read_bytes()[-8:-4], "little")
    return size - 8 - length // 2


def _last(file: Path) -> int:
    return file.stat().st_size - 1


def _middle(file: Path) -> int:
    return file.stat().st_size // 2


SHARD = "data/train/00001.parquet"
SECTIONS: list[tuple[str, str, Callable[[Path], int]]] = [
    ("parquet header", SHARD, _header),
    ("data page", SHARD, _data_page),
    ("parquet footer", SHARD, _footer_at),
    ("parquet end", SHARD, _last),
    ("held-out shard", "data/heldout/00000.parquet", _middle),
    ("shard record", record_name("train", 1), _middle),
    ("manifest", "_meta/manifest.json", _middle),
    ("rows.bin", "_meta/rows.bin", _middle),
    ("tokenizer", "_meta/tokenizer/tokenizer.json", _middle),
]


@pytest.mark.parametrize(("name", "where"), [s[1:] for s in SECTIONS], ids=[s[0] for s in SECTIONS])
def test_a_flipped_bit_is_found_wherever_it_is(
    name: str, where: Callable[[Path], int], cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(cache_dir)
    assert run_command(lambda: cache_command(["verify", url])) == 0
    assert "3 shards whole" in capsys.readouterr().out
    _flip(cache_dir / name, where(cache_dir / name))
    assert run_command(lambda: cache_command(["verify", url])) == CacheError.exit_code
    out, err = capsys.readouterr()
    assert name in out + err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    if name.endswith(".parquet"):
        cache = open_cache(url)  # opening is cheap and reads no shard
        with pytest.raises(CacheError, match=f"{name}: shard damaged: checksum"):
            _read_all(cache)
    elif "manifest" in name or "rows" in name:
        with pytest.raises(CacheError, match=name):
            open_cache(url)


def test_no_single_bit_of_the_manifest_passes(cache_dir: Path) -> None:
    file = cache_dir / "_meta/manifest.json"
    whole = file.read_bytes()
    before = open_cache(str(cache_dir)).manifest
    rng = np.random.default_rng(0)
    for at in rng.choice(len(whole), 300, replace=False).tolist():
        for bit in rng.choice(8, 2, replace=False).tolist():
            file.write_bytes(whole)
            _flip(file, at, bit)
            try:
                found = open_cache(str(cache_dir)).manifest
            except CacheError:
                continue
            # Only a change that JSON itself does not see, such as 1e-05 to 1E-05.
            assert found == before, (at, bit)


def test_verify_as_a_program(cache_dir: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline.cache", "verify", str(cache_dir)]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    assert run().returncode == 0
    _flip(cache_dir / SHARD, 40)
    _flip(cache_dir / "data/heldout/00000.parquet", 40)
    done = run()
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert "2 files are damaged, 1 shards are whole" in done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_commands(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache_command(["inspect", str(made)]) == 0
    out = capsys.readouterr().out
    assert open_cache(str(made)).manifest.identity_digest in out
    assert "2 shards, 8 sequences" in out
    assert cache_command(["--help"]) == 0
    assert "verify URL" in capsys.readouterr().out
    for wrong in (["verify"], ["check", "x"], ["inspect", "a", "b"]):
        with pytest.raises(ConfigError, match="not a command"):
            cache_command(wrong)


def test_missing_shard_and_missing_files(cache_dir: Path) -> None:
    (cache_dir / SHARD).unlink()
    with pytest.raises(CacheError, match=f"{SHARD}: shard damaged: missing"):
        _read_all(open_cache(str(cache_dir)))
    (cache_dir / "_meta/tokenizer/tokenizer.json").unlink()
    with pytest.raises(CacheError, match=r"tokenizer.json: missing or damaged"):
        open_cache(str(cache_dir)).tokenizer_files()
    (cache_dir / "_meta/rows.bin").unlink()
    with pytest.raises(CacheError, match=r"rows.bin: missing or damaged"):
        open_cache(str(cache_dir))


def test_rows_index_that_disagrees_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "cache"))
    record, data = sample_shard("train", 0, 5)
    commit_shard(store, record, data)
    finish(store, [replace(record, row_tokens=(1,), row_counted=(1,))], sample_identity())
    with pytest.raises(CacheError, match=r"rows.bin: 8 bytes for 5 rows"):
        open_cache(store.url)


def test_intact_record_is_none_where_a_shard_has_to_be_made_again(cache_dir: Path) -> None:
    store = Store(str(cache_dir))
    record, data = sample_shard("train", 1, 3)
    file, note = cache_dir / record.path, cache_dir / record_name("train", 1)

    def intact(*, check_bytes: bool = True) -> ShardRecord | None:
        return intact_record(store, "train", 1, check_bytes=check_bytes)

    assert intact() == record
    assert intact(check_bytes=False) == record
    _flip(file, _middle(file))
    assert intact() is None
    assert intact(check_bytes=False) == record
    file.write_bytes(data[:-1])
    assert intact(check_bytes=False) is None
    file.unlink()
    assert intact() is None
    commit_shard(store, record, data)
    assert intact() == record
    text = note.read_text()
    changed = text.replace(f'"counted": {record.counted}', f'"counted": {record.counted + 1}')
    assert changed != text
    for damaged in (changed, text[:-9], "[]", "{}", "3", "\x00"):
        note.write_text(damaged)
        assert intact() is None, damaged
    note.write_text((cache_dir / record_name("train", 0)).read_text())
    assert intact() is None  # another shard's record
    note.unlink()
    assert intact() is None


def test_shard_of_another_identity_is_refused(cache_dir: Path) -> None:
    other = sample_identity(corpus={"source": "elsewhere"})
    record, data = sample_shard("train", 1, 3, identity=other)
    (cache_dir / record.path).write_bytes(data)
    manifest = json.loads((cache_dir / "_meta/manifest.json").read_text())
    manifest["shards"][1] = record.to_json(with_rows=False)
    _rewrite_manifest(cache_dir, shards=manifest["shards"])
    source = open_cache(str(cache_dir)).source("train")
    assert source.read_rows(0, [0])
    with pytest.raises(CacheError, match=r"00001.parquet: .* of another identity"):
        source.read_rows(1, [0])


def test_parquet_without_our_footer_is_refused(cache_dir: Path) -> None:
    file = cache_dir / SHARD
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    data = file.read_bytes()
    manifest = json.loads((cache_dir / "_meta/manifest.json").read_text())
    from pipeline.cache.manifest import checksum

    manifest["shards"][1].update(bytes=len(data), xxh3_128=checksum(data))
    _rewrite_manifest(cache_dir, shards=manifest["shards"])
    with pytest.raises(CacheError, match="no distil_cache metadata"):
        open_cache(str(cache_dir)).source("train").read_rows(1, [0])


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
    first = row.counted_L.copy()
    first[np.flatnonzero(first)[0]], first[0] = False, True
    for wrong, tail, says in (
        (row, tails[0][:-1], "differ in length"),
        (replace(row, counted_L=first), tails[0], "do not match its counted tokens"),
        (replace(row, counted_L=row.counted_L & False), tails[0], "do not match"),
        (replace(row, targets=replace(targets, temperatures=(1.0, 3.0))), tails[0], "grid"),
        (
            replace(row, targets=replace(targets, gold_logprob_N=targets.gold_logprob_N[1:])),
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
    record, _ = sample_shard("heldout", 0, 2)
    with pytest.raises(CacheError, match="no training rows"):
        finish(store, [record], sample_identity())
    assert not store.exists("_meta/manifest.json")
    record, _ = sample_shard("train", 0, 2)
    with pytest.raises(CacheError, match="a tokenizer file is missing"):
        finalize(
            store, [record], identity=sample_identity(), spec=SPEC, temperatures=TEMPERATURES,
            corpus_counts={}, tokenizer_files=["gone.json"], command="",
        )  # fmt: skip


def test_finalize_writes_the_same_bytes_again(cache_dir: Path) -> None:
    names = ["_meta/manifest.json", "_meta/rows.bin", "README.md"]
    before = [(cache_dir / name).read_bytes() for name in names]
    (cache_dir / names[0]).unlink()
    write_cache(str(cache_dir))
    assert [(cache_dir / name).read_bytes() for name in names] == before


def test_cache_on_memory_store() -> None:
    url = "memory://whole/cache"
    write_cache(url)
    assert len(_read_all(open_cache(url))) == 10
    Store(url).write(SHARD, b"PAR1")
    with pytest.raises(CacheError, match=r"memory://whole/cache/data/train/00001.parquet"):
        _read_all(open_cache(url))


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
