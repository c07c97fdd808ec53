"""A synthetic cache of the default's shape for the stream's benchmark: lengths, masks, entries."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.cache.io.finalize import finalize
from pipeline.cache.io.writer import commit_shard, encode_shard
from pipeline.config import fingerprint
from pipeline.storage import Store

__all__ = ["MAX_LENGTH", "TEMPERATURES", "TOP_K", "VOCAB", "write_cache"]

VOCAB, TOP_K, MAX_LENGTH = 49_152, 64, 512
TEMPERATURES = (1.0, 2.0)
ROWS_PER_SHARD = 1500
"""More than one row group of the writer, as in real shards."""


def write_cache(folder: Path, rows: int, *, top_k: int = TOP_K) -> None:
    """Write a cache of chat-like rows: log-normal lengths, the last part of each is supervised.

    About three quarters of the tokens are supervised, as in a chat whose answers are.
    """
    spec = CodecSpec(vocab_size=VOCAB)
    identity = {
        "format_version": 1,
        "teacher": {
            "model": "synthetic", "revision": "r1", "batch_tokens": 64, "engine": "none",
            "engine_version": "0", "dtype": "float32", "device": "cpu",
        },
        "tokenizer": {"vocabulary_sha256": "0" * 64, "size": VOCAB},
        "corpus": {"source": "synthetic", "max_length": MAX_LENGTH},
        "scheme": {"name": "top-k", "top_k": top_k, "temperatures": list(TEMPERATURES)},
        "codec": spec.to_json(),
        "shard_tokens": 80_000,
    }  # fmt: skip
    store, rng, records = Store(str(folder)), np.random.default_rng(0), []
    sizes = [min(ROWS_PER_SHARD, rows - start) for start in range(0, rows, ROWS_PER_SHARD)]
    parts = [("train", index, size) for index, size in enumerate(sizes)]
    for split, index, count in [*parts, ("heldout", 0, 4)]:
        made = [_row(rng, top_k) for _ in range(count)]
        record, data = encode_shard(
            [row for row, _ in made],
            spec,
            split=split,
            index=index,
            temperatures=TEMPERATURES,
            identity_digest=fingerprint(identity),
            tails=[tail_N for _, tail_N in made],
        )
        commit_shard(store, record, data)
        records.append(record)
    finalize(
        store,
        Counter(record.split for record in records),
        identity=identity,
        spec=spec,
        temperatures=TEMPERATURES,
        corpus_counts={"rows": rows},
        tokenizer_files=[],
        command="bench-stream",
    )


def _row(rng: np.random.Generator, top_k: int) -> tuple[CachedSequence, NDArray[np.float32]]:
    length = int(np.clip(rng.lognormal(4.8, 0.7), 16, MAX_LENGTH))
    loss_mask_L = np.arange(length) >= max(1, int(length * rng.uniform(0.05, 0.45)))
    number = int(loss_mask_L.sum())
    # Distinct ascending ids, most of them of frequent tokens, as a language model's are.
    gaps_NK = rng.geometric(rng.uniform(0.002, 0.2, (number, top_k))).astype(np.int64)
    ids_NK = np.minimum(np.cumsum(gaps_NK, axis=1), VOCAB - top_k - 1) + np.arange(top_k)
    logits_NK = rng.normal(0, 2.5, (number, top_k))
    tail_N = rng.uniform(0.01, 0.2, number).astype(np.float32)
    p_NK = np.exp(logits_NK)
    p_NK *= (1 - tail_N[:, None]) / p_NK.sum(1, keepdims=True)
    moments = rng.uniform(0, 3, (number, len(TEMPERATURES))).astype(np.float32)
    targets = SparseTargets(
        counts_N=np.full(number, top_k, np.int32),
        token_ids_E=ids_NK.reshape(-1).astype(np.int32),
        logprobs_E=np.log(p_NK).reshape(-1).astype(np.float32),
        inclusion_E=None,
        temperatures=TEMPERATURES,
        log_z_NG=moments,
        entropy_NG=moments,
        label_logprob_N=-moments[:, 0],
    )
    ids_L = rng.integers(0, VOCAB, length).astype(np.int32)
    return CachedSequence(rng.bytes(16).hex(), ids_L, loss_mask_L, targets), tail_N
