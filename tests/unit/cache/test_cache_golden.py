"""The frozen caches, read by the project's reader and by an independent one from FORMAT.md."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
import zstandard

import pipeline.cache
from pipeline.cache.io.reader import open_cache

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
    rank = {token: rank for rank, token in enumerate(_order(table))}
    return {
        rank[token]
        for row in _expected(name)[: table.num_rows]
        for token, pi in zip(row["token_ids"], row["inclusion"], strict=True)
        if pi < 1
    }


# ---- An independent reader, from FORMAT.md alone: nothing of pipeline below this line. ----


def _order(table: Any) -> list[int]:
    """Return the token of each rank."""
    frame = base64.b64decode(table.schema.metadata[b"distill_ranks"])
    classes = zstandard.ZstdDecompressor().decompress(frame)
    return sorted(range(len(classes)), key=lambda token: (-classes[token], token))


class _Stream:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def next(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def half(self) -> int:
        self.at += 1
        return self.data[(self.at - 1) // 2] >> 4 * ((self.at - 1) % 2) & 15


def _number(stream: _Stream) -> int:
    """Seven bits a byte, the lowest first, the top bit set where another byte follows."""
    number = shift = 0
    while True:
        byte = stream.next()
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number


class _Bits:
    def __init__(self, data: bytes) -> None:
        self.number, self.at, self.end = int.from_bytes(data, "little"), 0, 8 * len(data)

    def take(self, count: int) -> int:
        value = self.number >> self.at & (1 << count) - 1
        self.at += count
        assert self.at <= self.end
        return value


def _dither(sample_id: str, r: int) -> float:
    x = ((r + 1) * 0x9E3779B97F4A7C15 + int(sample_id[:16], 16)) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    x ^= x >> 31
    return (x >> 10) % 2**24 / 2**24 - 0.5


def _runs(row: dict[str, bytes], kind: str, order: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Take counts by `send`, yield runs of (token, code)."""
    ids = [_Stream(row[f"{kind}_ids_{stream}"]) for stream in range(4)]
    bits = _Bits(row[f"{kind}_bits"])
    always_kept = kind != "sampled"
    names = (
        [f"{kind}_values"] if always_kept else [f"sampled_values_{stream}" for stream in range(3)]
    )
    values = [_Stream(row[name]) for name in names]
    run: list[tuple[int, int]] = []
    while True:
        count = yield run
        if count is None:
            break
        before, run = -1, []
        for left in range(count, 0, -1):
            stream = 2 * (before >= 62) + (left == 1)
            c = ids[stream].next()
            before += (1 << c) + bits.take(c)
            if always_kept:
                code = values[0].next()
            else:
                code = values[before >= 1023].half()
                if code == 15:
                    code = values[2].next()
            run.append((order[before], code))
    assert all(stream.at == len(stream.data) for stream in ids)
    assert 0 <= bits.end - bits.at < 8
    if always_kept:
        assert values[0].at == len(values[0].data)
    else:
        assert [(v.at + 1) // 2 for v in values[:2]] == [len(v.data) for v in values[:2]]
        assert values[2].at == len(values[2].data)
    yield []


def _read_row(
    row: dict[str, Any], codec: dict[str, Any], grid: list[float], order: list[int]
) -> dict[str, Any]:
    quantisation, rule = codec["quantisation"], codec["inclusion_rule"]
    a, b, s = (
        quantisation["always_kept_scale"],
        quantisation["always_kept_step"],
        quantisation["sampled_step"],
    )
    code_p = [-a * (math.exp(b * k) - 1) for k in range(256)]
    mass = [math.floor(65536 * math.exp(v) + 0.5) for v in code_p]
    places = [i for i, loss_mask in enumerate(row["loss_mask"]) if loss_mask]
    number, others = len(places), [t for t in grid if t != 1.0]
    dither = [_dither(row["sample_id"], i - 1) for i in places]
    high = row["counts_high"] or bytes(2 * number)
    log_z, entropy = [], []
    for n in range(number):
        values = {1.0: 0.0}
        for g, t in enumerate(others):
            low, top = row["log_z"][g * number + n], row["log_z_high"][g * number + n]
            step = low | top << 8
            values[t] = quantisation["log_z_step"] * (step - 65536 * (step >= 32768))
        log_z.append([values[t] for t in grid])
        entropy.append([
            quantisation["entropy_step"] * (row["entropy"][g * number + n] + dither[n])
            for g in range(len(grid))
        ])  # fmt: skip
    used = [] if rule is None else [g for g, tau in enumerate(rule["taus"]) if tau > 0]
    alone = rule is not None and [grid[g] for g in used] == [1.0]
    always_kept = _runs(row, "always_kept", order)
    sampled = _runs(row, "sampled", order)
    next(always_kept), next(sampled)
    requests = codec.get("requested_entries", False)
    requested = _runs(row, "requested", order) if requests else None
    if requested is not None:
        next(requested)
    choices = _Stream(row["largest"]) if codec.get("largest_known") else None
    largest: list[int] = []
    code_r = [-0.05 * (math.exp(0.028 * k) - 1) for k in range(256)]
    counts, ids, logprobs, inclusion = [], [], [], []
    for n, place in enumerate(places):
        own = always_kept.send(row["always_kept_counts"][n] | high[n] << 8)  # type: ignore[attr-defined]
        u = row["sampled_counts"][n] | high[number + n] << 8
        label = row["label_logprob"][n]
        if alone:
            t = max(1, math.floor(65536 * rule["taus"][grid.index(1.0)] + 0.5))
            rest = max(0, 65536 - mass[label] - sum(mass[k] for _, k in own))
            u = (rest + t // 2) // t + (u // 2 if u % 2 == 0 else -(u + 1) // 2)
        far = sampled.send(u)  # type: ignore[attr-defined]
        if choices is not None:
            first_of_all = [] if rule is None else [(row["input_ids"][place], label)]
            candidates = [*first_of_all, *sorted(own)]
            lowest = min((k for _, k in candidates), default=0)
            candidates = [token for token, k in candidates if k == lowest]
            chosen = _number(choices) if len(candidates) > 1 else 0
            largest.append(candidates[chosen] if candidates else -1)
        found: list[tuple[int, float, float]] = []
        if rule is not None:
            found.append((row["input_ids"][place], code_p[label], 1.0))
        found += [(token, code_p[k], 1.0) for token, k in sorted(own)]
        for token, k in sorted(far):
            log_p = -s * (k + dither[n])
            total = sum(
                (math.exp(log_p / grid[g] - log_z[n][g]) / rule["taus"][g]) ** 2 for g in used
            )
            found.append((token, log_p, min(1 - 2**-20, math.sqrt(total))))
        if rule is None and found:
            p = [math.exp(value) for _, value, _ in found]
            codes = [k for _, k in sorted(own)]
            m = codes.index(min(codes))
            tail = row["tail"][n]
            rest = 1 - (0.0 if tail == 255 else math.exp(-quantisation["tail_step"] * tail))
            rest -= sum(p[:m] + p[m + 1 :])
            bounded = min(max(rest, p[m] * math.exp(-b)), min(p[m] * math.exp(b), 1.0))
            found[m] = (found[m][0], math.log(bounded), 1.0)
        if requested is not None:
            run = requested.send(row["requested_counts"][n])  # type: ignore[attr-defined]
            asked = {token: code_r[k] for token, k in run}
            first = [] if rule is None else found[:1]
            kept = {token: value for token, value, pi in found[len(first) :] if pi == 1}
            kept = {**asked, **kept} if rule is None else {**kept, **asked}
            rest_of = [entry for entry in found[len(first) :] if entry[2] < 1]
            found = [*first, *((token, value, 1.0) for token, value in sorted(kept.items()))]
            found += [entry for entry in rest_of if entry[0] not in asked]
        counts.append(len(found))
        ids += [token for token, _, _ in found]
        logprobs += [value for _, value, _ in found]
        inclusion += [pi for _, _, pi in found]
    always_kept.send(None), sampled.send(None)  # type: ignore[attr-defined]
    if requested is not None:
        requested.send(None)  # type: ignore[attr-defined]
    assert choices is None or choices.at == len(choices.data)
    written = []
    if codec.get("written_logprobs"):
        low, top = row["written_logprob"], row["written_logprob_high"]
        assert len(low) == len(top) == number
        written = [-(one | other << 8) / 1024 for one, other in zip(low, top, strict=True)]
    return {
        "counts": counts, "token_ids": ids, "logprobs": logprobs, "inclusion": inclusion,
        "log_z": log_z, "entropy": entropy,
        "label_logprob": [code_p[k] for k in row["label_logprob"]], "written": written,
        "largest": largest,
    }  # fmt: skip


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
        order = _order(table)
        assert len(order) == codec["vocab_size"]
        entries = 0
        for row in table.to_pylist():
            want, got = next(wanted), _read_row(row, own, grid, order)
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
    got = _read_row(row, codec, [1.0], [0, 1, 2, 3])
    assert (got["counts"], got["token_ids"]) == ([2], [2, 0])
    stated = [float(v) for v in re.findall(r"-[01]\.\d{8}", example)]
    assert [_dither("0" * 32, 0), *got["logprobs"]] == pytest.approx(
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
