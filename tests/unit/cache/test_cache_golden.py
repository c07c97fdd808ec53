"""The frozen caches, read by the project's reader and by an independent one from FORMAT.md."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash

import pipeline.cache
from pipeline.cache.io.reader import open_cache
from tests.unit.cache.independent_reader import dither_of, order_of, read_row

GOLDEN = Path(__file__).parents[2] / "golden"
FORMAT = Path(pipeline.cache.__file__).parent / "FORMAT.md"
SHA256 = {
    "top-k": (
        "c69dfed5e813d41656a026e369bc4096b3e979c15c4bcb5a2020d6685423a93d",
        "138bc987e54c4de51970558e031c7eeb6455ac4d1ba39c37874ccee8c94af5f7",
    ),
    "threshold": (
        "9f6220e2535fc6cfde62e7b1a5c85642afdefc8cf9ec99113a8669b504369461",
        "0585b077cfdf5c9566a413c6d09316cfcb3958920e4218fc88b08e3fd5a4728d",
    ),
    "top-k-sampled": (
        "1967e0445d7c6d4e68ba3e1fb53f0d41a9f4adb98f879d57d9ee139630269f05",
        "bf593076e06f195ac531d538c04c51f6c5bab87f12f9f4221fe8752697c15b16",
    ),
    "threshold-of-three": (
        "ce9c0102d9183701eb2b0448eb64898398ba9a4c0f6c65a20e7b2794d7419430",
        "78c36bdc013b3cfb867debc872944495965cd9b938e6b15f9a40b0e79996eecb",
    ),
    "threshold-long": (
        "1a3d813987b53ec326b5f98dac03930def7ac4675c3b0097a1afb3b926b1be46",
        "b3354b861dc445ffba261cf768e920739c29ea6584f91a315b5ad486e4ecc305",
    ),
    "threshold-coarse": (
        "f559f1fa84c1cba3932a0707916506fd717429282f6339ff8a4a950bca41747a",
        "7e23fbbf0195bfb5b2186e2797cffb9b5b2d5d8168b4bde1e5f509c2a38deb3f",
    ),
    "top-k-heldout": (
        "c5c9208dfba080717e4d338a323ebf0ff686dcfb6f5103efb678d66d06fa25d8",
        "42d2284faeea02593d22e71e4e86807fc1df8c3f3d97fca187a62d01a79e567e",
    ),
    "top-k-requested": (
        "a664b5b6ef7f1859299350ce277851293ce64b729fe9c3ce36aed0b61ed935f4",
        "5dee12631fd2dbd3ae56ef68d53448b675ce0b3a3b7aa53b3a881c36caf1f368",
    ),
    "threshold-requested": (
        "9e693d61dccbd4fdbce5563b0b227ebf0ab1706ffeafc2b3d6d96cd4889dd72f",
        "41341377f2bf1a251cde9249fbed3c47703ff88ad8be50dd6e1182d182b967a5",
    ),
}
"""Of the manifest, which names every other file's checksum, and of the expected values."""
NAMES = tuple(SHA256)


def _expected(name: str) -> list[dict[str, Any]]:
    file = GOLDEN / f"cache-v1-{name}.expected.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return rows


@pytest.mark.parametrize("name", SHA256)
def test_the_samples_are_frozen(name: str) -> None:
    """A change of these files is a change of the format; after the release, of its version."""
    files = (f"cache-v1-{name}/_meta/manifest.json", f"cache-v1-{name}.expected.json")
    found = [hashlib.sha256((GOLDEN / file).read_bytes()).hexdigest() for file in files]
    assert tuple(found) == SHA256[name]


@pytest.mark.parametrize("name", NAMES)
def test_our_reader_finds_what_was_frozen(name: str) -> None:
    cache, expected = open_cache(str(GOLDEN / f"cache-v1-{name}")), _expected(name)
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
        assert row.loss_mask_L.tolist() == want["loss_mask"]
        assert targets.counts_N.tolist() == want["counts"]
        assert targets.token_ids_E.tolist() == want["token_ids"]
        np.testing.assert_allclose(targets.logprobs_E, want["logprobs"], rtol=1e-6, atol=1e-9)
        assert (targets.inclusion_E is None) == (want["inclusion"] is None)
        if targets.inclusion_E is not None:
            np.testing.assert_allclose(targets.inclusion_E, want["inclusion"], rtol=1e-5)
        shape = targets.log_z_NG.shape
        log_z = np.array(want["log_z"]).reshape(shape)
        np.testing.assert_allclose(targets.log_z_NG, log_z, rtol=1e-6)
        entropy = np.array(want["entropy"]).reshape(shape)
        np.testing.assert_allclose(targets.entropy_NG, entropy, rtol=1e-6)
        np.testing.assert_allclose(targets.label_logprob_N, want["label_logprob"], rtol=1e-6)
        assert (targets.largest_N is None) == ("largest" not in want)
        if targets.largest_N is not None:
            assert targets.largest_N.tolist() == want["largest"]
        if "written_logprob" in want:
            np.testing.assert_allclose(targets.written_logprob_N, want["written_logprob"])


def test_the_samples_reach_every_part_of_the_format() -> None:
    counts = {count for row in _expected("top-k") for count in row["counts"]}
    assert counts == {0, 1, 3, 300}
    assert min(v for row in _expected("threshold-of-three") for vs in row["log_z"] for v in vs) < 0
    sampled = [
        (logprob, pi)
        for row in _expected("threshold-coarse")
        for logprob, pi in zip(row["logprobs"], row["inclusion"], strict=True)
        if pi < 1
    ]
    assert max(sampled) > (0, 0.999)
    assert {1022, 1023} <= _sampled_ranks("threshold-of-three")
    tables = [
        pq.read_table(file).to_pylist() for file in GOLDEN.glob("cache-v1-*/data/*/*.parquet")
    ]
    filled = {name for rows in tables for row in rows for name, value in row.items() if value}
    assert filled == {name for rows in tables for row in rows for name in row}


def _sampled_ranks(name: str) -> set[int]:
    """Return the ranks of the sampled entries of the first shard."""
    table = pq.read_table(GOLDEN / f"cache-v1-{name}/data/train/00000.parquet")
    rank = {token: rank for rank, token in enumerate(order_of(table))}
    return {
        rank[token]
        for row in _expected(name)[: table.num_rows]
        for token, pi in zip(row["token_ids"], row["inclusion"], strict=True)
        if pi < 1
    }


# ---- Read by an independent reader, from FORMAT.md alone. ----


@pytest.mark.parametrize("name", NAMES)
def test_a_stranger_reads_it_too(name: str) -> None:
    folder = GOLDEN / f"cache-v1-{name}"
    manifest = json.loads((folder / "_meta/manifest.json").read_text(encoding="utf-8"))
    assert (manifest["format"], manifest["format_version"]) == ("distill-cache", 1)
    codec, grid = manifest["codec"], manifest["temperatures"]
    assert codec["name"] == "ranked"
    wanted = iter(_expected(name))
    segments = [pq.read_table(folder / entry["path"]) for entry in manifest["segments"]]
    for record in [record for table in segments for record in table.to_pylist()]:
        data = (folder / record["path"]).read_bytes()
        assert xxhash.xxh3_128(data).digest().hex() == record["xxh3_128"]
        table = pq.read_table(folder / record["path"])
        note = json.loads(table.schema.metadata[b"distill_cache"])
        assert note["identity_digest"] == manifest["identity_digest"]
        own = {**codec, **codec.get("heldout", {})} if record["split"] == "heldout" else codec
        own = {name: value for name, value in own.items() if name != "heldout"}
        assert (note["codec"], note["temperatures"]) == (own, grid)
        order = order_of(table)
        assert len(order) == codec["vocab_size"]
        entries = 0
        for row in table.to_pylist():
            want, got = next(wanted), read_row(row, own, grid, order)
            assert row["sample_id"] == want["sample_id"]
            assert got["counts"] == want["counts"]
            assert got["token_ids"] == want["token_ids"]
            assert got["logprobs"] == pytest.approx(want["logprobs"], rel=1e-5, abs=1e-8)
            assert got["inclusion"] == pytest.approx(
                want["inclusion"] or [1.0] * len(got["inclusion"]), rel=1e-4
            )
            assert got["label_logprob"] == pytest.approx(want["label_logprob"], rel=1e-5)
            assert got["largest"] == want.get("largest", [])
            assert got["written"] == pytest.approx(want.get("written_logprob", []), abs=1e-6)
            for column in ("log_z", "entropy"):
                for one, other in zip(got[column], want[column], strict=True):
                    assert one == pytest.approx(other, rel=1e-5, abs=1e-7)
            entries += len(got["token_ids"])
        assert entries == record["entries"]


def test_the_worked_example() -> None:
    text = FORMAT.read_text(encoding="utf-8")
    example = text[text.index("## 9. Worked example") :]
    codec = {
        "inclusion_rule": {"temperatures": [1.0], "taus": [0.25]},
        "quantisation": {
            "always_kept_scale": 0.05, "always_kept_step": 0.06, "sampled_step": 2.0,
            "log_z_step": 1 / 64, "entropy_step": 0.25, "tail_step": 1 / 16,
        },
    }  # fmt: skip
    row: dict[str, Any] = {
        f"{kind}_ids_{n}": b"" for kind in ("always_kept", "sampled") for n in range(4)
    }
    row |= {f"sampled_values_{n}": b"" for n in range(3)}
    names = (
        "always_kept_bits",
        "sampled_bits",
        "always_kept_values",
        "counts_high",
        "log_z",
        "log_z_high",
    )
    row |= dict.fromkeys(names, b"")
    for name, value in re.findall(r"`(\w+)` is `([0-9a-f]{2})`", example):
        row[name] = bytes.fromhex(value)
    row |= {
        "sample_id": "0" * 32, "input_ids": [3, 2], "loss_mask": [False, True], "entropy": b"\x00",
    }  # fmt: skip
    got = read_row(row, codec, [1.0], [0, 1, 2, 3])
    assert (got["counts"], got["token_ids"]) == ([2], [2, 0])
    stated = [float(v) for v in re.findall(r"-[01]\.\d{8}", example)]
    assert [dither_of("0" * 32, 0), *got["logprobs"]] == pytest.approx(
        [stated[0], stated[1], stated[-1]], abs=1e-7
    )
    assert got["inclusion"] == pytest.approx([1.0, 0.70175752], abs=1e-7)


def test_format_page_names_every_column_and_member() -> None:
    text = FORMAT.read_text(encoding="utf-8")
    folder = GOLDEN / "cache-v1-top-k-heldout"
    manifest = json.loads((folder / "_meta/manifest.json").read_text())
    names = {
        *manifest,
        *manifest["segments"][0],
        *manifest["codec"],
        *manifest["codec"]["quantisation"],
    }
    names |= {
        re.sub(r"_\d$", "_", n) for n in pq.read_schema(folder / "data/train/00000.parquet").names
    }
    missing = [name for name in names if f"`{name}" not in text and f'"{name}' not in text]
    assert missing == []
