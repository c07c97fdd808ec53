"""Small caches of random distributions, complete or in parts, for all tests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cache.codec.arrow import coded_table, quantised
from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.cache.io.finalize import finalize
from pipeline.cache.io.reader import Cache
from pipeline.cache.io.writer import commit_shard, encode_shard
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.manifest import Manifest, segment_of
from pipeline.cache.layout.records import ShardRecord, encode_segment
from pipeline.cache.layout.schema import check_rows, footer
from pipeline.config import fingerprint
from pipeline.storage import Store

TEMPERATURES = (1.0, 2.0)
SPEC = CodecSpec(vocab_size=500)
SIZES = (("train", 0, 5), ("train", 1, 3), ("heldout", 0, 2))
"""Split, index and rows of the shards of `write_cache`."""
SHARD = "data/train/00001.parquet"


def rows_to_table(
    rows: Sequence[CachedSequence],
    spec: CodecSpec,
    *,
    temperatures: Sequence[float],
    identity_digest: str,
    tails: Sequence[NDArray[np.float32]],
) -> pa.Table:
    """Encode rows into an Arrow table; `tails[i]` is the tail mass of row i's N positions.

    Raises:
        CacheError: rows that do not fit the codec, or themselves.
    """
    check_rows(rows, temperatures)
    metadata = footer(spec, temperatures, identity_digest)
    heads, coded = quantised(rows, spec, tails)
    return coded_table(heads, coded, spec, metadata)


def sample_identity(**changes: Any) -> dict[str, Any]:
    """Return an identity of the usual form; `changes` replace parts of it."""
    return {
        "format_version": 1,
        "teacher": {
            "model": "tiny", "revision": "r1", "batch_tokens": 64, "engine": "numpy",
            "engine_version": "2", "dtype": "float32", "device": "cpu",
        },
        "tokenizer": {"vocabulary_sha256": "0" * 64, "size": 500},
        "corpus": {"source": "random"},
        "scheme": {"name": "top-k", "top_k": 6, "temperatures": list(TEMPERATURES)},
        "codec": SPEC.to_json(),
        "shard_tokens": 32,
        **changes,
    }  # fmt: skip


def sample_row(rng: np.random.Generator) -> tuple[CachedSequence, NDArray[np.float32]]:
    """Return a row of random length and the tail mass of its supervised positions."""
    length = int(rng.integers(2, 40))
    loss_mask = rng.random(length) < 0.5
    loss_mask[0] = False
    number = int(loss_mask.sum())
    logits = rng.normal(0, 3, (number, SPEC.vocab_size))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    counts = rng.integers(0, 7, number).astype(np.int32)
    ids = [np.sort(np.argsort(-log_p[n])[:k]) for n, k in enumerate(counts)]
    values = [log_p[n, chosen] for n, chosen in enumerate(ids)]
    log_z = np.stack([np.log(np.exp(log_p / t).sum(1)) for t in TEMPERATURES], 1)
    empty = np.zeros(0)
    targets = SparseTargets(
        counts_N=counts,
        token_ids_E=np.concatenate([empty, *ids]).astype(np.int32),
        logprobs_E=np.concatenate([empty, *values]).astype(np.float32),
        inclusion_E=None,
        temperatures=TEMPERATURES,
        log_z_NG=log_z.astype(np.float32),
        entropy_NG=np.abs(log_z).astype(np.float32),
        label_logprob_N=log_p[:, 0].astype(np.float32),
    )
    ids_L = rng.integers(0, SPEC.vocab_size, length).astype(np.int32)
    tail_N = np.array([1 - np.exp(v).sum() for v in values], np.float32)
    return CachedSequence(rng.bytes(16).hex(), ids_L, loss_mask, targets), tail_N


def sample_rows(number: int, seed: int) -> tuple[list[CachedSequence], list[NDArray[np.float32]]]:
    """Return rows and their tails; the same for the same seed."""
    rng = np.random.default_rng(seed)
    made = [sample_row(rng) for _ in range(number)]
    return [row for row, _ in made], [tail for _, tail in made]


def sample_shard(
    split: str, index: int, number: int, *, identity: dict[str, Any] | None = None
) -> tuple[ShardRecord, bytes]:
    """Encode the shard that `write_cache` writes under this name."""
    rows, tails = sample_rows(number, seed=100 * (split == "heldout") + index)
    return encode_shard(
        rows,
        SPEC,
        split=split,
        index=index,
        temperatures=TEMPERATURES,
        identity_digest=fingerprint(identity or sample_identity()),
        tails=tails,
    )


def finish(store: Store, records: Sequence[ShardRecord], identity: dict[str, Any]) -> Manifest:
    """Write the files that follow the shards."""
    store.write("_meta/tokenizer/tokenizer.json", b'{"model": {"vocab": {"a": 0, "b": 1}}}')
    return finalize(
        store,
        Counter(record.split for record in records),
        identity=identity,
        spec=SPEC,
        temperatures=TEMPERATURES,
        corpus_counts={"rows": 10},
        tokenizer_files=["tokenizer.json"],
        command="made by a test",
    )


def write_cache(url: str) -> Manifest:
    """Write a complete cache of three shards and ten rows."""
    store, identity = Store(url), sample_identity()
    records = []
    for split, index, number in SIZES:
        record, data = sample_shard(split, index, number, identity=identity)
        commit_shard(store, record, data)
        records.append(record)
    return finish(store, records, identity)


def read_all(cache: Cache) -> list[Any]:
    return [
        row
        for split in ("train", "heldout")
        for shard, rows in enumerate(cache.source(split).shard_rows())
        for row in cache.source(split).read_rows(shard, range(rows))
    ]


def forge(folder: Path, record: ShardRecord) -> None:
    """Replace the record of train/00001 in its segment and in the manifest."""
    first, _ = sample_shard("train", 0, 5)
    raw = encode_segment([first, record])
    entry = segment_of([first, record], size=len(raw), xxh3_128=checksum(raw))
    (folder / entry.path).write_bytes(raw)
    manifest = json.loads((folder / "_meta/manifest.json").read_text())
    rewrite_manifest(folder, segments=[asdict(entry), manifest["segments"][1]])


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    file = folder / "_meta/manifest.json"
    data = {**json.loads(file.read_text()), **changes}
    del data["manifest_sha256"]
    data["manifest_sha256"] = fingerprint(data)
    file.write_text(json.dumps(data))
