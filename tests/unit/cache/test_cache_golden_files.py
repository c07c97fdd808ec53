"""The other files of a frozen cache, read by an independent reader from FORMAT.md alone."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import xxhash
import zstandard

import pipeline.cache

GOLDEN = Path(__file__).parents[2] / "golden"
FORMAT = Path(pipeline.cache.__file__).parent / "FORMAT.md"
CACHES = sorted(path for path in GOLDEN.glob("cache-v1-*") if path.is_dir())


class _Number(str):
    """A number literal as written in the file."""


def _parse(text: str) -> Any:
    return json.loads(text, parse_int=_Number, parse_float=_Number)


def _canonical(value: Any) -> str:
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f",
                 "\r": "\\r"}  # fmt: skip
        escaped = (short.get(c) or (f"\\u{ord(c):04x}" if c < " " else c) for c in value)
        return '"' + "".join(escaped) + '"'
    if isinstance(value, list):
        return "[" + ",".join(map(_canonical, value)) + "]"
    members = (f"{_canonical(name)}:{_canonical(value[name])}" for name in sorted(value))
    return "{" + ",".join(members) + "}"


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


@pytest.mark.parametrize("cache", CACHES, ids=lambda path: path.name)
def test_digests_checksums_and_sums(cache: Path) -> None:
    manifest = _parse((cache / "_meta/manifest.json").read_text(encoding="utf-8"))
    stored = manifest.pop("manifest_sha256")
    assert _digest(manifest) == stored
    assert manifest["format"] == "distill-cache"
    assert int(manifest["format_version"]) == 1
    assert manifest["identity_digest"] == _digest(manifest["identity"])
    packed = (cache / "_meta/rows.bin").read_bytes()
    assert xxhash.xxh3_128(packed).digest().hex() == manifest["rows_xxh3_128"]
    lengths = list(struct.iter_unpack("<ii", zstandard.ZstdDecompressor().decompress(packed)))
    for name, checksum in manifest["tokenizer_xxh3_128"].items():
        data = (cache / "_meta/tokenizer" / name).read_bytes()
        assert xxhash.xxh3_128(data).digest().hex() == checksum
    number = 0
    for record in manifest["shards"]:
        data = (cache / record["path"]).read_bytes()
        assert record["path"] == f"data/{record['split']}/{int(record['index']):05d}.parquet"
        assert len(data) == int(record["bytes"])
        assert xxhash.xxh3_128(data).digest().hex() == record["xxh3_128"]
        table = pq.read_table(cache / record["path"])
        note = json.loads(table.schema.metadata[b"distill_cache"])
        assert set(note) == {"format_version", "identity_digest", "codec", "temperatures"}
        rows = table.to_pylist()
        assert len(rows) == int(record["rows"])
        assert sum(row["num_tokens"] for row in rows) == int(record["tokens"])
        assert sum(row["num_loss_tokens"] for row in rows) == int(record["loss_tokens"])
        for row in rows:
            assert (row["num_tokens"], row["num_loss_tokens"]) == lengths[number]
            assert sum(row["loss_mask"]) == row["num_loss_tokens"]
            number += 1
    assert number == len(lengths)


@pytest.mark.parametrize("cache", CACHES, ids=lambda path: path.name)
def test_records_repeat_the_manifest(cache: Path) -> None:
    manifest = _parse((cache / "_meta/manifest.json").read_text(encoding="utf-8"))
    packed = (cache / "_meta/rows.bin").read_bytes()
    lengths = list(struct.iter_unpack("<ii", zstandard.ZstdDecompressor().decompress(packed)))
    for file in (cache / "_meta/shards").iterdir():
        note = _parse(file.read_text(encoding="utf-8"))
        stored = note.pop("record_sha256")
        assert _digest(note) == stored
        start = [r["path"] for r in manifest["shards"]].index(note["path"])
        before = sum(int(r["rows"]) for r in manifest["shards"][:start])
        own = lengths[before : before + int(note["rows"])]
        assert [int(n) for n in note.pop("row_tokens")] == [tokens for tokens, _ in own]
        assert [int(n) for n in note.pop("row_loss_tokens")] == [
            loss_tokens for _, loss_tokens in own
        ]
        assert note == manifest["shards"][start]


def test_format_page_names_every_member() -> None:
    text = FORMAT.read_text(encoding="utf-8")
    manifest = json.loads((CACHES[0] / "_meta/manifest.json").read_text())
    names = {*manifest, *manifest["shards"][0], *manifest["codec"], *manifest["identity"]}
    names |= set(json.loads((CACHES[0] / "_meta/shards/train-00000.json").read_text()))
    missing = [name for name in names if f"`{name}`" not in text and f'"{name}"' not in text]
    assert missing == []
