"""The manifest: what it says of a cache, its checksum, and how identities are compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cache.layout.names import MANIFEST, PLAN, RECORDS, SPLITS, SegmentName, repair_advice
from pipeline.cache.layout.recorded import Recorded, missing_text
from pipeline.cache.layout.records import ShardRecord
from pipeline.cache.layout.schema import FORMAT_VERSION
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = [
    "Manifest",
    "Segment",
    "Totals",
    "describe_difference",
    "planned_counts",
    "read_manifest",
    "segment_of",
    "shard_identity",
    "total_of",
]


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over shards, and means over their supervised positions."""

    shards: int
    rows: int
    tokens: int
    loss_tokens: int
    entries: int
    bytes: int
    kept_mass: float
    entropy: float


@dataclass(frozen=True, slots=True)
class Segment:
    """What the manifest says of one file of records: which, their sums, its checksum."""

    path: str
    split: str
    first: int
    shards: int
    rows: int
    tokens: int
    loss_tokens: int
    entries: int
    bytes: int
    """Of the shards."""
    kept_mass: float
    entropy: float
    segment_bytes: int
    """Of the file of records itself."""
    xxh3_128: str

    @property
    def name(self) -> SegmentName:
        """What the file's name says."""
        return SegmentName(self.split, self.first, self.first + self.shards - 1)


def shard_identity(identity: dict[str, Any]) -> str | None:
    """Return the identity digest that every shard of a cache carries.

    None in a cache made from others: a shard that was taken over unchanged has that of the cache
    for which it was captured. Its record's checksum says that it belongs here.
    """
    return None if "derived" in identity else fingerprint(identity)


def segment_of(records: Sequence[ShardRecord], *, size: int, xxh3_128: str) -> Segment:
    """Return the manifest's entry of a segment with these records."""
    name = SegmentName(records[0].split, records[0].index, records[-1].index)
    total = total_of(records)
    sums = {**asdict(total), "kept_mass": round(total.kept_mass, 6)}
    sums["entropy"] = round(total.entropy, 6)
    return Segment(
        path=name.path, split=name.split, first=name.first, segment_bytes=size, xxh3_128=xxh3_128,
        **sums,
    )  # fmt: skip


def total_of(parts: Iterable[ShardRecord | Segment]) -> Totals:
    """Return the sums and means of shards or segments."""
    shards = rows = tokens = loss_tokens = entries = size = 0
    kept_mass = entropy = 0.0
    for part in parts:
        shards += part.shards if isinstance(part, Segment) else 1
        rows += part.rows
        tokens += part.tokens
        loss_tokens += part.loss_tokens
        entries += part.entries
        size += part.bytes
        kept_mass += part.kept_mass * part.loss_tokens
        entropy += part.entropy * part.loss_tokens
    each = max(loss_tokens, 1)
    return Totals(
        shards, rows, tokens, loss_tokens, entries, size, kept_mass / each, entropy / each
    )


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of a cache; written last, so a cache that has one is complete."""

    identity: dict[str, Any]
    codec: dict[str, Any]
    temperatures: tuple[float, ...]
    segments: tuple[Segment, ...]
    """All of `train` by their first shard, then all of `heldout`."""
    corpus_counts: dict[str, int]
    tokenizer_xxh3_128: dict[str, str]
    """The tokenizer's files below `_meta/tokenizer`, each with its checksum."""
    format_version: int
    corpus_content: str = ""
    """Digest of all text that was read; empty where it is not known."""

    @property
    def identity_digest(self) -> str:
        """SHA-256 of the canonical JSON of the identity."""
        return fingerprint(self.identity)

    @property
    def shard_identity(self) -> str | None:
        """The identity digest that every shard carries; None in a cache made from others."""
        return shard_identity(self.identity)

    def of_split(self, split: str) -> tuple[Segment, ...]:
        """Return the segments of one split, in order; none where it has no shard."""
        return tuple(item for item in self.segments if item.split == split)

    def total(self, split: str | None = None) -> Totals:
        """Return the sums over one split, or over the cache."""
        return total_of(self.segments if split is None else self.of_split(split))

    @property
    def shard_counts(self) -> dict[str, int]:
        """Shards by split; a split without any is left out."""
        counts = {split: self.total(split).shards for split in SPLITS}
        return {split: count for split, count in counts.items() if count}

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
            "corpus_content": self.corpus_content,
            "tokenizer_xxh3_128": self.tokenizer_xxh3_128,
            "segments": [asdict(item) for item in self.segments],
        }
        # The checksum covers the rest, so that a flipped byte in the manifest is detected.
        data["manifest_sha256"] = fingerprint(data)
        return json.dumps(data, indent=1, ensure_ascii=False).encode()


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
            do=repair_advice(store.url),
        )
    foreign = _names_elsewhere(data)
    if not damaged and foreign is not None:
        raise CacheError(
            f"{store.full_url(MANIFEST)}: names the file {foreign!r}",
            expected="names that FORMAT.md gives, all of them inside the cache",
            do="do not use it: whoever wrote it wants files elsewhere to be read or written",
        )
    if "segments" not in data:
        raise CacheError(
            f"{store.url}: a cache of a draft of the format, without segments of records",
            expected="one that a released version wrote",
            do="make it again, or read it with the version that wrote it",
        )
    return Manifest(
        identity=data["identity"],
        codec=data["codec"],
        temperatures=tuple(data["temperatures"]),
        segments=tuple(_segment(item) for item in data["segments"]),
        corpus_counts=data["corpus_counts"],
        corpus_content=data["corpus_content"],
        tokenizer_xxh3_128=data["tokenizer_xxh3_128"],
        format_version=version,
    )


def _names_elsewhere(data: dict[str, Any]) -> str | None:
    """Return a name in a manifest that need not be a file of the cache, such as one with `..`."""
    for item in data.get("segments", ()):
        segment = _segment(item)
        if segment.split not in SPLITS or segment.path != segment.name.path:
            return segment.path
    for name in data.get("tokenizer_xxh3_128", {}):
        if "\\" in name or {"", ".", ".."} & set(name.split("/")):
            return str(name)
    return None


def _segment(data: dict[str, Any]) -> Segment:
    # Members that this version does not know are passed over.
    return Segment(**{name: data[name] for name in Segment.__dataclass_fields__})


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


def planned_counts(raw: bytes) -> dict[str, int]:
    """Return the shards of each split that a plan file names; none where it is damaged."""
    try:
        listed = json.loads(raw).get("shards", {})
        if isinstance(listed, dict):
            return {split: int(listed[split]) for split in SPLITS if split in listed}
        planned = [str(item["split"]) for item in listed]
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {split: planned.count(split) for split in SPLITS if split in planned}


def _incomplete(store: Store) -> CacheError:
    try:
        planned = planned_counts(store.read(PLAN))
    except FileNotFoundError:
        return CacheError(
            f"{store.url}: no cache there (no {MANIFEST})",
            expected="a folder written by cache-teacher",
            do="run cache-teacher first, or correct the address",
        )
    recorded = Recorded(store.list(RECORDS))
    what = missing_text(recorded, planned) or f"{len(recorded)} shards, but no manifest"
    return CacheError(
        f"{store.url}: the cache is incomplete ({what})",
        do="run the same cache-teacher command again; it computes only what is missing",
    )
