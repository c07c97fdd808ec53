"""Made tests/golden/cache-v1 and its expected values, once; kept to say how. Tests never run it.

    .venv/bin/python tests/golden/make_cache_v1.py FOLDER

writes FOLDER/cache-v1 and FOLDER/cache-v1.expected.json and refuses to replace either.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.codec.gaps import CodecSpec
from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.writer import commit_shard, encode_shard, finalize
from pipeline.config import fingerprint
from pipeline.storage import Store

VOCAB = 300
TEMPERATURES = (1.0, 2.0, 0.5)
LENGTHS = {"train": [[7, 2, 12], [9]], "heldout": [[5]]}


def _row(rng: np.random.Generator, length: int) -> tuple[CachedSequence, Any, list[float]]:
    ids = rng.integers(0, VOCAB, length).astype(np.int32)
    counted = rng.random(length) < 0.6
    counted[0], counted[-1] = False, True
    where = np.flatnonzero(counted)
    z = rng.normal(0, rng.choice([0.5, 3.0, 8.0], (where.size, 1)), (where.size, VOCAB))
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    counts, tokens, values, tails = [], [], [], []
    for n in range(where.size):
        k = int(rng.choice([0, 1, 3, 8]))
        top = np.sort(np.argsort(-log_p[n], kind="stable")[:k])
        counts.append(k)
        tokens += top.tolist()
        values += log_p[n, top].tolist()
        tails.append(1 - np.exp(log_p[n, top]).sum())
    log_z = np.stack([np.log(np.exp(log_p / t).sum(1)) for t in TEMPERATURES], 1)
    log_p_t = [log_p / t - log_z[:, [g]] for g, t in enumerate(TEMPERATURES)]
    entropy = np.stack([-(np.exp(lp) * lp).sum(1) for lp in log_p_t], 1)
    targets = SparseTargets(
        counts_N=np.array(counts, np.int32),
        token_ids_E=np.array(tokens, np.int32),
        logprobs_E=np.array(values, np.float32),
        inclusion_E=None,
        temperatures=TEMPERATURES,
        log_z_NG=log_z.astype(np.float32),
        entropy_NG=entropy.astype(np.float32),
        gold_logprob_N=log_p[np.arange(where.size), ids[where]].astype(np.float32),
    )
    row = CachedSequence(rng.bytes(16).hex(), ids, counted, targets)
    return row, np.array(tails, np.float32), values


def main(folder: Path) -> None:
    """Write the cache and what a reader must find in it."""
    target, expected_file = folder / "cache-v1", folder / "cache-v1.expected.json"
    if target.exists() or expected_file.exists():
        raise SystemExit("a frozen sample is never written anew")
    rng = np.random.default_rng(20260101)
    spec = CodecSpec(vocab_size=VOCAB)
    scheme = {"name": "top-k", "top_k": 8, "temperatures": list(TEMPERATURES)}
    identity: dict[str, Any] = {
        "format_version": 1,
        "teacher": {
            "model": "golden \u00e4\u4e2d\U0001f600\t\"\\", "revision": None, "dtype": "float64",
            "engine": "numpy", "engine_version": "2", "device": "cpu", "batch_tokens": 16,
        },
        "tokenizer": {"vocabulary_sha256": "0" * 64, "size": VOCAB},
        "corpus": {"source": "random", "heldout_fraction": 1e-05, "shuffle": False},
        "scheme": scheme, "codec": spec.to_json(), "shard_tokens": 16,
    }  # fmt: skip
    store = Store(str(target))
    store.write("_meta/tokenizer/tokenizer.json", b'{"golden": true}\n')
    records, truth = [], {}
    for split, shards in LENGTHS.items():
        for index, lengths in enumerate(shards):
            made = [_row(rng, length) for length in lengths]
            record, data = encode_shard(
                [row for row, _, _ in made], spec, split=split, index=index,
                temperatures=TEMPERATURES, identity_digest=fingerprint(identity),
                tails=[tail for _, tail, _ in made],
            )  # fmt: skip
            commit_shard(store, record, data)
            records.append(record)
            truth.update({row.sample_id: values for row, _, values in made})
    finalize(
        store, records, identity=identity, spec=spec, temperatures=TEMPERATURES,
        corpus_counts={"rows": 5}, tokenizer_files=["tokenizer.json"], command="golden",
    )  # fmt: skip
    cache = open_cache(str(target))
    rows = []
    for split in LENGTHS:
        source = cache.source(split)
        for shard, count in enumerate(source.shard_rows()):
            for row in source.read_rows(shard, range(count)):
                t = row.targets
                rows.append({
                    "split": split, "shard": shard, "sample_id": row.sample_id,
                    "input_ids": row.input_ids_L.tolist(), "counted": row.counted_L.tolist(),
                    "counts": t.counts_N.tolist(), "token_ids": t.token_ids_E.tolist(),
                    "logprobs": t.logprobs_E.tolist(), "true_logprobs": truth[row.sample_id],
                    "log_z": t.log_z_NG.tolist(), "entropy": t.entropy_NG.tolist(),
                    "gold_logprob": t.gold_logprob_N.tolist(),
                })  # fmt: skip
    expected_file.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
