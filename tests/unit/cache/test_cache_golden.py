"""The frozen version-1 cache, read by our reader and by a stranger's who only has FORMAT.md."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
import zstandard

import pipeline.cache
from pipeline.cache.codec.gaps import CodecSpec, decode_entries
from pipeline.cache.io.reader import open_cache

GOLDEN = Path(__file__).parents[2] / "golden"
CACHE = GOLDEN / "cache-v1"
FORMAT = Path(pipeline.cache.__file__).parent / "FORMAT.md"
MANIFEST_SHA256 = "0e7e3032f9fa5b3327fdc5112edd082f29ccfe45f634a6a65061de5b26b3f1a5"
EXPECTED_SHA256 = "d36a9b5f8d5fbbf9258a44dbc236eecab6014689646097d0468067e08f9f37a4"


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((GOLDEN / "cache-v1.expected.json").read_text())["rows"]
    return rows


def test_the_sample_is_frozen() -> None:
    """A change of these files is a change of the format: add cache-v2, leave cache-v1 alone."""
    for file, wanted in (
        (CACHE / "_meta/manifest.json", MANIFEST_SHA256),
        (GOLDEN / "cache-v1.expected.json", EXPECTED_SHA256),
    ):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == wanted


def test_our_reader_finds_what_was_frozen(expected: list[dict[str, Any]]) -> None:
    cache = open_cache(str(CACHE))
    assert cache.manifest.temperatures == (1.0, 2.0, 0.5)
    assert list(cache.tokenizer_files()) == ["tokenizer.json"]
    found = [
        (split, shard, row)
        for split in ("train", "heldout")
        for shard, rows in enumerate(cache.source(split).shard_rows())
        for row in cache.source(split).read_rows(shard, range(rows))
    ]
    assert len(found) == len(expected) == 5
    for (split, shard, row), want in zip(found, expected, strict=True):
        targets = row.targets
        assert (split, shard, row.sample_id) == (want["split"], want["shard"], want["sample_id"])
        assert row.input_ids_L.tolist() == want["input_ids"]
        assert row.counted_L.tolist() == want["counted"]
        assert targets.counts_N.tolist() == want["counts"]
        assert targets.token_ids_E.tolist() == want["token_ids"]
        np.testing.assert_allclose(targets.logprobs_E, want["logprobs"], rtol=1e-6)
        np.testing.assert_allclose(targets.logprobs_E, want["true_logprobs"], atol=1.5 / 12)
        assert targets.log_z_NG.tolist() == want["log_z"]
        assert targets.entropy_NG.tolist() == want["entropy"]
        assert targets.gold_logprob_N.tolist() == want["gold_logprob"]
    assert {0, 1, 8} <= {count for row in expected for count in row["counts"]}


# ---- A stranger's reader: from FORMAT.md alone, nothing of pipeline below this line. ----


class _Number(str):
    """A number literal as it stands in the file."""


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


def _entries(
    blob: bytes, num_counted: int, vocab: int, step: float, tail: list[float]
) -> tuple[list[int], list[int], list[float]]:
    counts = list(struct.unpack_from(f"<{num_counted}H", blob))
    total, planes = sum(counts), 2 if vocab <= 65536 else 3
    assert len(blob) == 2 * num_counted + (planes + 1) * total
    ids: list[int] = []
    logprobs: list[float] = []
    at = 0
    for n, count in enumerate(counts):
        before = -1
        grid = []
        for e in range(at, at + count):
            start = 2 * num_counted
            gap = sum(blob[start + p * total + e] << (8 * p) for p in range(planes))
            before = before + 1 + gap
            assert before < vocab
            ids.append(before)
            grid.append(blob[start + planes * total + e])
        at += count
        if not count:
            continue
        p = [math.exp(-step * q) for q in grid]
        m = grid.index(min(grid))
        rest = 1 - tail[n] - sum(p[:m] + p[m + 1 :])
        low, high = p[m] * math.exp(-step), min(p[m] * math.exp(step), 1.0)
        values = [-step * q for q in grid]
        values[m] = math.log(min(max(rest, low), high))
        logprobs += values
    return counts, ids, logprobs


def test_a_stranger_reads_it_too(expected: list[dict[str, Any]]) -> None:
    manifest = _parse((CACHE / "_meta/manifest.json").read_text(encoding="utf-8"))
    stored = manifest.pop("manifest_sha256")
    assert _digest(manifest) == stored
    assert manifest["format"] == "distil-cache"
    assert int(manifest["format_version"]) == 1
    assert manifest["identity_digest"] == _digest(manifest["identity"])
    codec = manifest["codec"]
    assert codec["name"] == "gaps-u8"
    vocab, step = int(codec["vocab_size"]), float(codec["step_nats"])
    grid = len(manifest["temperatures"])

    packed = (CACHE / "_meta/rows.bin").read_bytes()
    assert xxhash.xxh3_128(packed).digest().hex() == manifest["rows_xxh3_128"]
    index = zstandard.ZstdDecompressor().decompress(packed)
    lengths = list(struct.iter_unpack("<ii", index))
    for name, checksum in manifest["tokenizer_xxh3_128"].items():
        data = (CACHE / "_meta/tokenizer" / name).read_bytes()
        assert xxhash.xxh3_128(data).digest().hex() == checksum

    wanted = iter(expected)
    number = 0
    for record in manifest["shards"]:
        data = (CACHE / record["path"]).read_bytes()
        assert record["path"] == f"data/{record['split']}/{int(record['index']):05d}.parquet"
        assert len(data) == int(record["bytes"])
        assert xxhash.xxh3_128(data).digest().hex() == record["xxh3_128"]
        table = pq.read_table(CACHE / record["path"])
        note = json.loads(table.schema.metadata[b"distil_cache"])
        assert note["identity_digest"] == manifest["identity_digest"]
        assert set(note) == {"format_version", "identity_digest", "codec", "temperatures"}
        rows = table.to_pylist()
        assert len(rows) == int(record["rows"])
        assert sum(row["num_tokens"] for row in rows) == int(record["tokens"])
        assert sum(row["num_counted"] for row in rows) == int(record["counted"])
        entries = 0
        for row in rows:
            want = next(wanted)
            counted = row["num_counted"]
            assert (row["num_tokens"], counted) == lengths[number]
            number += 1
            assert row["sample_id"] == want["sample_id"]
            assert row["input_ids"] == want["input_ids"]
            assert row["counted"] == want["counted"]
            assert sum(row["counted"]) == counted
            counts, ids, logprobs = _entries(row["entries"], counted, vocab, step, row["tail_mass"])
            assert (counts, ids) == (want["counts"], want["token_ids"])
            assert logprobs == pytest.approx(want["logprobs"], rel=1e-6)
            for name in ("log_z", "entropy"):
                values = row[name]
                shaped = [values[n * grid : (n + 1) * grid] for n in range(counted)]
                assert shaped == want[name]
            assert row["gold_logprob"] == want["gold_logprob"]
            entries += len(ids)
        assert entries == int(record["entries"])
    assert number == len(lengths) == len(expected)

    for file in (CACHE / "_meta/shards").iterdir():
        note = _parse(file.read_text(encoding="utf-8"))
        stored = note.pop("record_sha256")
        assert _digest(note) == stored
        start = [r["path"] for r in manifest["shards"]].index(note["path"])
        before = sum(int(r["rows"]) for r in manifest["shards"][:start])
        own = lengths[before : before + int(note["rows"])]
        assert [int(n) for n in note["row_tokens"]] == [tokens for tokens, _ in own]
        assert [int(n) for n in note["row_counted"]] == [counted for _, counted in own]
        del note["row_tokens"], note["row_counted"]
        assert note == manifest["shards"][start]


# ---- The worked examples of FORMAT.md. ----


def test_worked_examples() -> None:
    text = FORMAT.read_text(encoding="utf-8")
    blobs = {
        int(vocab): bytes.fromhex(body)
        for vocab, body in re.findall(r"```hex (\d+)\n([0-9a-f \n]+)```", text)
    }
    assert sorted(blobs) == [300, 70000]
    tails = [0.05, 1.0, 0.4]
    half = [float(np.float16(tail)) for tail in tails]
    counts, ids, logprobs = _entries(blobs[300], 3, 300, 1 / 12, half)
    assert (counts, ids) == ([2, 0, 1], [5, 260, 299])
    stated = [float(v) for v in re.findall(r"log p = (-0\.\d{8})", text)]
    assert [logprobs[0], logprobs[2]] == pytest.approx(stated, abs=1e-8)
    assert logprobs[1] == pytest.approx(-1.75)
    counts, ids, _ = _entries(blobs[70000], 1, 70000, 1 / 12, [0.0])
    assert (counts, ids) == ([3], [1, 65537, 69999])
    for vocab, positions in ((300, 3), (70000, 1)):
        spec = CodecSpec(vocab_size=vocab)
        tail = np.array(half if vocab == 300 else [0.0], np.float32)
        got = decode_entries(blobs[vocab], positions, spec, tail_N=tail)
        want = _entries(blobs[vocab], positions, vocab, 1 / 12, tail.tolist())
        assert got[0].tolist() == want[0]
        assert got[1].tolist() == want[1]
        np.testing.assert_allclose(got[2], want[2], rtol=1e-5, atol=1e-6)


def test_format_page_names_every_column_and_member() -> None:
    text = FORMAT.read_text(encoding="utf-8")
    manifest = json.loads((CACHE / "_meta/manifest.json").read_text())
    names = {*manifest, *manifest["shards"][0], *manifest["codec"], *manifest["identity"]}
    names |= set(pq.read_schema(CACHE / "data/train/00000.parquet").names)
    names |= set(json.loads((CACHE / "_meta/shards/train-00000.json").read_text()))
    missing = [name for name in names if f"`{name}`" not in text and f'"{name}"' not in text]
    assert missing == []
