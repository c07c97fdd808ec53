"""Manifest, shard records and row lengths: their content, their checksums, and comparison."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from pipeline.cache.layout.schema import FORMAT_VERSION
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = [
    "MANIFEST",
    "PLAN",
    "ROWS",
    "SPLITS",
    "Manifest",
    "ShardRecord",
    "checksum",
    "decode_record",
    "describe_difference",
    "encode_record",
    "read_manifest",
    "record_name",
    "shard_name",
    "tokenizer_name",
]

MANIFEST = "_meta/manifest.json"
PLAN = "_meta/plan.json"
ROWS = "_meta/rows.bin"
RESPONSES = "_meta/responses"
"""Folder of the responses, where the teacher wrote them."""
SPLITS = ("train", "heldout")


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """The record of one committed shard; nothing in it depends on who wrote it or when."""

    split: str
    index: int
    path: str
    """Relative to the cache, `data/<split>/<index>.parquet`."""
    rows: int
    tokens: int
    loss_tokens: int
    entries: int
    bytes: int
    xxh3_128: str
    kept_mass: float
    """Mean over supervised positions of the mass in the stored entries at temperature 1."""
    entropy: float
    """Mean entropy at temperature 1, nats."""
    row_tokens: Sequence[int] = field(default=(), hash=False)
    """Tokens of each row; kept as int32, eight times smaller than a tuple of integers."""
    row_loss_tokens: Sequence[int] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        """Pack the per-row numbers: a worker keeps those of all shards until the manifest."""
        object.__setattr__(self, "row_tokens", array("i", self.row_tokens))
        object.__setattr__(self, "row_loss_tokens", array("i", self.row_loss_tokens))

    def to_json(self, *, with_rows: bool) -> dict[str, Any]:
        """Return the JSON form; the manifest leaves the per-row numbers to `rows.bin`."""
        data = asdict(self)
        for name in ("row_tokens", "row_loss_tokens"):
            rows = data.pop(name)
            if with_rows:
                data[name] = rows.tolist()
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ShardRecord:
        """Read the JSON form."""
        return cls(**data)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of a cache; written last, so a cache that has one is complete."""

    identity: dict[str, Any]
    codec: dict[str, Any]
    temperatures: tuple[float, ...]
    shards: tuple[ShardRecord, ...]
    corpus_counts: dict[str, int]
    tokenizer_xxh3_128: dict[str, str]
    """The tokenizer's files below `_meta/tokenizer`, each with its checksum."""
    rows_xxh3_128: str
    """Checksum of `rows.bin`: zstd of int32 [rows, 2], (tokens, loss tokens) in shard order."""
    format_version: int

    @property
    def identity_digest(self) -> str:
        """SHA-256 of the canonical JSON of the identity."""
        return fingerprint(self.identity)

    def of_split(self, split: str) -> tuple[ShardRecord, ...]:
        """Return the records of one split, by index."""
        return tuple(record for record in self.shards if record.split == split)

    def to_bytes(self) -> bytes:
        """Return the file's content; the same bytes for the same cache."""
        data = {
            "format": "distill-cache",
            "format_version": self.format_version,
            "identity_digest": self.identity_digest,
            "identity": self.identity,
            "codec": self.codec,
            "temperatures": list(self.temperatures),
            "corpus_counts": self.corpus_counts,
            "tokenizer_xxh3_128": self.tokenizer_xxh3_128,
            "rows_xxh3_128": self.rows_xxh3_128,
            "shards": [record.to_json(with_rows=False) for record in self.shards],
        }
        # The checksum covers the rest, so that a flipped byte in the manifest is detected.
        data["manifest_sha256"] = fingerprint(data)
        return json.dumps(data, indent=1, ensure_ascii=False).encode()


def encode_record(record: ShardRecord) -> bytes:
    """Return the content of a shard's record file, with a checksum over the rest of it."""
    data = record.to_json(with_rows=True)
    data["record_sha256"] = fingerprint(data)
    return json.dumps(data, sort_keys=True).encode()


def decode_record(raw: bytes) -> ShardRecord | None:
    """Read a record file; None where it is damaged."""
    try:
        data = json.loads(raw)
        stored = data.pop("record_sha256")
        return ShardRecord.from_json(data) if fingerprint(data) == stored else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def read_manifest(store: Store) -> Manifest:
    """Read and check the manifest.

    Raises:
        CacheError: missing (the message lists what is there), damaged, or of a newer format.
    """
    try:
        raw = store.read(MANIFEST)
    except FileNotFoundError:
        raise _incomplete(store) from None
    try:
        data = json.loads(raw)
        stored = data.pop("manifest_sha256")
        damaged = fingerprint(data) != stored
    except (ValueError, KeyError, TypeError, AttributeError):
        data, damaged = {}, True
    version = data.get("format_version", FORMAT_VERSION)
    if not damaged and (not isinstance(version, int) or version > FORMAT_VERSION):
        raise CacheError(
            f"{store.url}: a cache of format version {version}",
            expected=f"at most {FORMAT_VERSION}",
            do="upgrade this project to read it",
        )
    if damaged or data.get("format") != "distill-cache":
        raise CacheError(
            f"{store.full_url(MANIFEST)}: damaged (its checksum does not match)",
            do="delete it and run cache-teacher again: finished shards are kept and checked",
        )
    return Manifest(
        identity=data["identity"],
        codec=data["codec"],
        temperatures=tuple(data["temperatures"]),
        shards=tuple(ShardRecord.from_json(item) for item in data["shards"]),
        corpus_counts=data["corpus_counts"],
        tokenizer_xxh3_128=data["tokenizer_xxh3_128"],
        rows_xxh3_128=data["rows_xxh3_128"],
        format_version=version,
    )


def read_rows_index(store: Store, manifest: Manifest) -> NDArray[np.int32]:
    """Return int32 [rows, 2]: tokens and supervised tokens of every row, train then held-out.

    Raises:
        CacheError: the file is missing, damaged, or disagrees with the manifest.
    """
    try:
        raw = store.read(ROWS)
    except FileNotFoundError:
        raw = b""
    if checksum(raw) != manifest.rows_xxh3_128:
        raise CacheError(
            f"{store.full_url(ROWS)}: missing or damaged",
            do="delete _meta/manifest.json and run cache-teacher again to write both again",
        )
    rows = sum(record.rows for record in manifest.shards)
    data = zstandard.ZstdDecompressor().decompress(raw, max_output_size=8 * rows + 64)
    if len(data) != 8 * rows:
        raise CacheError(f"{store.full_url(ROWS)}: {len(data)} bytes for {rows} rows")
    return np.frombuffer(data, "<i4").reshape(rows, 2).astype(np.int32)


def pack_rows_index(records: Sequence[ShardRecord]) -> bytes:
    """Return the content of `rows.bin` for records that carry their per-row numbers."""
    columns = ([r.row_tokens for r in records], [r.row_loss_tokens for r in records])
    rows_R2 = np.stack([_joined(column) for column in columns], axis=1)
    return zstandard.ZstdCompressor(level=9).compress(rows_R2.data)


def _joined(counts: Iterable[Sequence[int]]) -> NDArray[np.int32]:
    return np.concatenate([np.asarray(part, "<i4") for part in counts])


def checksum(data: bytes) -> str:
    """Return XXH3-128 in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


def shard_name(split: str, index: int) -> str:
    """Return the shard's path inside the cache."""
    return f"data/{split}/{index:05d}.parquet"


def record_name(split: str, index: int) -> str:
    """Return the path of the shard's record inside the cache."""
    return f"_meta/shards/{split}-{index:05d}.json"


def tokenizer_name(file: str) -> str:
    """Return the path of a tokenizer file inside the cache."""
    return f"_meta/tokenizer/{file}"


def describe_difference(found: dict[str, Any], wanted: dict[str, Any], limit: int = 5) -> str:
    """Name the fields in which two identities differ, as `field: found -> wanted`."""
    flat_found, flat_wanted = _flatten(found), _flatten(wanted)
    changed = [
        f"{name}: {_short(flat_found.get(name))} there, {_short(flat_wanted.get(name))} asked for"
        for name in sorted(flat_found.keys() | flat_wanted.keys())
        if flat_found.get(name) != flat_wanted.get(name)
    ]
    more = f" and {len(changed) - limit} more" if len(changed) > limit else ""
    return "; ".join(changed[:limit]) + more


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _incomplete(store: Store) -> CacheError:
    plan = _read_json(store, PLAN)
    if plan is None:
        return CacheError(
            f"{store.url}: no cache there (no {MANIFEST})",
            expected="a folder written by cache-teacher",
            do="run cache-teacher first, or correct the address",
        )
    try:
        planned = [(str(s["split"]), int(s["index"])) for s in plan["shards"]]
    except (KeyError, TypeError, ValueError):
        planned = []
    have = set(store.list("_meta/shards"))
    missing = [
        f"{split}/{index:05d}"
        for split, index in planned
        if record_name(split, index).rsplit("/", 1)[-1] not in have
    ]
    listed = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
    what = (
        f"{len(missing)} of {len(planned)} shards missing: {listed}" if missing else "no manifest"
    )
    return CacheError(
        f"{store.url}: the cache is incomplete ({what})",
        do="run the same cache-teacher command again; it computes only what is missing",
    )


def _read_json(store: Store, name: str) -> dict[str, Any] | None:
    try:
        data = json.loads(store.read(name))
    except (FileNotFoundError, ValueError):
        return None
    return data if isinstance(data, dict) else None
