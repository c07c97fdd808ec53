"""A damaged or incomplete cache is detected and named, and never read as if it were intact."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cache.__main__ import main as cache_command
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.writer import commit_shard
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.names import record_name
from pipeline.cache.layout.records import ShardRecord
from pipeline.errors import CacheError, ConfigError, run_command
from pipeline.storage import Store
from tests.unit.cache.planned_cache import SEGMENT, lose
from tests.unit.cache.records import intact_record
from tests.unit.cache.sample_cache import (
    SHARD,
    forge,
    read_all,
    rewrite_manifest,
    sample_identity,
    sample_shard,
)


def _flip(file: Path, at: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(bytes(data))


def _header(file: Path) -> int:
    return 1


def _data_page(file: Path) -> int:
    chunk = pq.ParquetFile(file).metadata.row_group(0).column(9)
    assert chunk.path_in_schema == "always_kept_ids_1"
    return chunk.data_page_offset + chunk.total_compressed_size - 3


def _footer_at(file: Path) -> int:
    size = file.stat().st_size
    length = int.from_bytes(file.read_bytes()[-8:-4], "little")
    return size - 8 - length // 2


def _last(file: Path) -> int:
    return file.stat().st_size - 1


def _middle(file: Path) -> int:
    return file.stat().st_size // 2


SECTIONS: list[tuple[str, str, Callable[[Path], int]]] = [
    ("parquet header", SHARD, _header),
    ("data page", SHARD, _data_page),
    ("parquet footer", SHARD, _footer_at),
    ("parquet end", SHARD, _last),
    ("held-out shard", "data/heldout/00000.parquet", _middle),
    ("records", SEGMENT, _middle),
    ("manifest", "_meta/manifest.json", _middle),
    ("tokenizer", "_meta/tokenizer/tokenizer.json", _middle),
]


@pytest.mark.parametrize(("name", "where"), [s[1:] for s in SECTIONS], ids=[s[0] for s in SECTIONS])
def test_a_flipped_bit_is_found_wherever_it_is(
    name: str, where: Callable[[Path], int], cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(cache_dir)
    assert run_command(lambda: cache_command(["verify", url])) == 0
    assert "3 shards intact" in capsys.readouterr().out
    _flip(cache_dir / name, where(cache_dir / name))
    assert run_command(lambda: cache_command(["verify", url])) == CacheError.exit_code
    out, err = capsys.readouterr()
    assert name in out + err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    if name.startswith("data/"):
        cache = open_cache(url)  # opening is cheap and reads no shard
        with pytest.raises(CacheError, match=f"{name}: shard damaged: checksum"):
            read_all(cache)
    elif "manifest" in name or "shards" in name:
        with pytest.raises(CacheError, match=name):
            open_cache(url).source("train")


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
            # Only a change without meaning in JSON, such as 1e-05 to 1E-05.
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
    told = [line for line in done.stderr.splitlines() if not line.startswith("verify: ")]
    assert len(told) == 1  # a slow machine prints progress before
    assert "2 files are damaged, 1 shards are intact" in done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_commands(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache_command(["inspect", str(made)]) == 0
    out = capsys.readouterr().out
    assert open_cache(str(made)).manifest.identity_digest in out
    assert "2 shards, 8 sequences" in out
    assert cache_command(["--help"]) == 0
    assert "decode every row" in capsys.readouterr().out
    for wrong, says in (
        (["verify"], "required: URL"),
        (["check", "x"], "'check' is not a command; expected one of inspect, "),
        (["inspect", "a", "b"], "'b' is one address too many"),
    ):
        with pytest.raises(ConfigError, match=says):
            cache_command(wrong)


def test_missing_shard_and_missing_files(cache_dir: Path) -> None:
    (cache_dir / SHARD).unlink()
    with pytest.raises(CacheError, match=f"{SHARD}: shard damaged: missing"):
        read_all(open_cache(str(cache_dir)))
    (cache_dir / "_meta/tokenizer/tokenizer.json").unlink()
    with pytest.raises(CacheError, match=r"tokenizer.json: missing or damaged"):
        open_cache(str(cache_dir)).tokenizer_files()
    (cache_dir / SEGMENT).unlink()
    with pytest.raises(
        CacheError, match=rf"{SEGMENT}: records missing or damaged: missing.*repair"
    ):
        open_cache(str(cache_dir)).source("train")


def test_records_that_disagree_with_the_manifest_are_refused(cache_dir: Path) -> None:
    record, _ = sample_shard("train", 1, 3)
    whole = (cache_dir / "_meta/manifest.json").read_text()
    for changed, says in (
        ({"row_tokens": [1, 1, 1]}, "its row_tokens are not those of its records"),
        ({"row_loss_tokens": list(record.row_loss_tokens)[:-1]}, "its row_loss_tokens are not"),
    ):
        forge(cache_dir, replace(record, **changed))
        with pytest.raises(CacheError, match=says):
            open_cache(str(cache_dir)).source("train")
    # The manifest of other sums, with the right checksum: only a writer could have made it.
    (cache_dir / "_meta/manifest.json").write_text(whole)
    forge(cache_dir, record)
    entries = json.loads((cache_dir / "_meta/manifest.json").read_text())["segments"]
    entries[0]["tokens"] += 1
    rewrite_manifest(cache_dir, segments=entries)
    with pytest.raises(CacheError, match=r"[0-9]+ tokens, the manifest says [0-9]+"):
        open_cache(str(cache_dir)).source("train")


def test_intact_record_is_none_where_a_shard_has_to_be_made_again(cache_dir: Path) -> None:
    store = Store(str(cache_dir))
    record, data = sample_shard("train", 1, 3)
    lose(cache_dir)
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
    raw = note.read_bytes()
    for at in range(0, len(raw), 7):
        note.write_bytes(raw)
        _flip(note, at)
        assert intact() is None, at
    for damaged in (raw[:-9], b"", b"PAR1", b"\0" * 500):
        note.write_bytes(damaged)
        assert intact() is None, damaged
    note.write_bytes((cache_dir / record_name("train", 0)).read_bytes())
    assert intact() is None  # another shard's record
    note.unlink()
    assert intact() is None


def test_shard_of_another_identity_is_refused(cache_dir: Path) -> None:
    other = sample_identity(corpus={"source": "elsewhere"})
    record, data = sample_shard("train", 1, 3, identity=other)
    (cache_dir / record.path).write_bytes(data)
    forge(cache_dir, record)
    source = open_cache(str(cache_dir)).source("train")
    assert source.read_rows(0, [0])
    with pytest.raises(CacheError, match=r"00001.parquet: .* of another identity"):
        source.read_rows(1, [0])


def test_parquet_without_our_footer_is_refused(cache_dir: Path) -> None:
    file = cache_dir / SHARD
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    data = file.read_bytes()
    record, _ = sample_shard("train", 1, 3)
    forge(cache_dir, replace(record, bytes=len(data), xxh3_128=checksum(data)))
    with pytest.raises(CacheError, match="no distill_cache metadata"):
        open_cache(str(cache_dir)).source("train").read_rows(1, [0])


def test_a_bit_flipped_in_transfer_is_read_again(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [row.sample_id for row in read_all(open_cache(str(cache_dir)))]
    read, reads = Store.read, []

    def flipped_once(self: Store, name: str, **options: bool) -> bytes:
        data = read(self, name, **options)
        reads.append(name)
        first = name == SHARD and reads.count(SHARD) == 1
        return bytes([data[0] ^ 1]) + data[1:] if first else data

    monkeypatch.setattr(Store, "read", flipped_once)
    assert [row.sample_id for row in read_all(open_cache(str(cache_dir)))] == whole
    assert reads.count(SHARD) == 2
