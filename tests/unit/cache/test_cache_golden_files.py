"""The other files of a frozen cache, read by an independent reader from FORMAT.md alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import xxhash

import pipeline.cache
from pipeline.cache.layout.schema import footer
from pipeline.corpus.sample import CorpusCounts
from pipeline.teacher.generation.run import RESPONSES_LOST
from tests.unit.cache.sample_cache import SPEC

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


def _xxh3(data: bytes) -> str:
    return xxhash.xxh3_128(data).digest().hex()


@pytest.mark.parametrize("cache", CACHES, ids=lambda path: path.name)
def test_digests_checksums_and_sums(cache: Path) -> None:
    manifest = _parse((cache / "_meta/manifest.json").read_text(encoding="utf-8"))
    stored = manifest.pop("manifest_sha256")
    assert _digest(manifest) == stored
    assert manifest["format"] == "distill-cache"
    assert int(manifest["format_version"]) == 1
    assert manifest["identity_digest"] == _digest(manifest["identity"])
    for name, checksum in manifest["tokenizer_xxh3_128"].items():
        assert _xxh3((cache / "_meta/tokenizer" / name).read_bytes()) == checksum
    seen = []
    for segment in manifest["segments"]:
        for record in _records(cache, segment):
            seen.append((record["split"], record["index"]))
            data = (cache / record["path"]).read_bytes()
            assert record["path"] == f"data/{record['split']}/{record['index']:05d}.parquet"
            assert len(data) == record["bytes"]
            assert _xxh3(data) == record["xxh3_128"]
            table = pq.read_table(cache / record["path"])
            note = json.loads(table.schema.metadata[b"distill_cache"])
            assert set(note) == {"format_version", "identity_digest", "codec", "temperatures"}
            assert note["identity_digest"] == manifest["identity_digest"]
            rows = table.to_pylist()
            assert [row["num_tokens"] for row in rows] == record["row_tokens"]
            assert [row["num_loss_tokens"] for row in rows] == record["row_loss_tokens"]
            assert bytes.fromhex("".join(r["sample_id"] for r in rows)) == record["row_ids"]
            for row in rows:
                assert sum(row["loss_mask"]) == row["num_loss_tokens"]
    assert seen == [("train", 0), ("train", 1), ("heldout", 0)]


def _records(cache: Path, segment: dict[str, Any]) -> list[dict[str, Any]]:
    """Read a segment as FORMAT.md says, and compare it with the manifest's entry and itself."""
    data = (cache / segment["path"]).read_bytes()
    assert len(data) == int(segment["segment_bytes"])
    assert _xxh3(data) == segment["xxh3_128"]
    place = data.rindex(b"xxh3-128:") + 9
    assert _xxh3(data[:place] + b"0" * 32 + data[place + 32 :]).encode() == data[place : place + 32]
    file = pq.ParquetFile(cache / segment["path"])
    assert file.num_row_groups == 1
    records: list[dict[str, Any]] = file.read().to_pylist()
    first, shards = int(segment["first"]), int(segment["shards"])
    assert [record["index"] for record in records] == list(range(first, first + shards))
    last = first + shards - 1
    span = f"{first:05d}" if first == last else f"{first:05d}-{last:05d}"
    assert segment["path"] == f"_meta/shards/{segment['split']}-{span}.parquet"
    for name in ("rows", "tokens", "loss_tokens", "entries", "bytes"):
        assert sum(record[name] for record in records) == int(segment[name])
    positions = max(1, sum(record["loss_tokens"] for record in records))
    for name in ("kept_mass", "entropy"):
        mean = sum(record[name] * record["loss_tokens"] for record in records) / positions
        assert mean == pytest.approx(float(segment[name]), abs=1e-6)
    for record in records:
        assert record["split"] == segment["split"]
        assert len(record["row_tokens"]) == record["rows"] == len(record["row_loss_tokens"])
        assert sum(record["row_tokens"]) == record["tokens"]
        assert sum(record["row_loss_tokens"]) == record["loss_tokens"]
        assert len(record["row_ids"]) == 16 * record["rows"]
    return records


def test_format_page_names_every_member() -> None:
    text = FORMAT.read_text(encoding="utf-8")
    manifest = json.loads((CACHES[0] / "_meta/manifest.json").read_text())
    names = {*manifest, *manifest["segments"][0], *manifest["codec"], *manifest["identity"]}
    names |= set(pq.read_schema(CACHES[0] / "_meta/shards/heldout-00000.parquet").names)
    missing = [name for name in names if f"`{name}`" not in text and f'"{name}"' not in text]
    assert missing == []
    counts = [field.name for field in fields(CorpusCounts)]
    footer_of = footer(SPEC, [1.0], "0" * 64, source_xxh3_128="0" * 32, rows_quarantined=1)
    for told, start, end in (
        ([*counts, RESPONSES_LOST, "rows_quarantined"], "\n| `corpus_counts` |", "\n| `"),
        (json.loads(footer_of[b"distill_cache"]), "\n**Key-value metadata", "\n`distill_ranks`"),
    ):
        part = text.partition(start)[2].partition(end)[0]
        assert [name for name in told if f"`{name}`" not in part] == []
