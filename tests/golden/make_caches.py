"""Made the caches tests/golden/cache-v1-* and their expected values, once; tests never run it.

    PYTHONPATH=. .venv/bin/python tests/golden/make_caches.py FOLDER [NAME ...]

writes FOLDER/cache-v1-NAME and FOLDER/cache-v1-NAME.expected.json, of each name without names, and
refuses to replace any.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.codec.targets import CachedSequence, RequestedEntries, SparseTargets
from pipeline.cache.io.finalize import finalize
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.writer import commit_shard, encode_shard
from pipeline.config import fingerprint
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.quantisation import HELDOUT_QUANTISATION
from pipeline.storage import Store
from tests.unit.cache.sampled_cache import sampled_row

VOCAB = 1500
SIZES = {"train": [3, 1], "heldout": [1]}


@dataclass(frozen=True, slots=True)
class Sample:
    """How one frozen cache is made."""

    rule: InclusionRule | None
    most: int = 0
    """Tokens of a row."""
    exact: int = 0
    flat: float = 9.0
    """Standard deviation of the first shard's logits, 9 in the others. Flat rows have long runs and
    rare tokens, confident ones a single draw."""
    seed: int = 20261124
    noted: bool = False
    """With written log-probs, requested entries and the likeliest tokens."""
    heldout: InclusionRule | None = None
    """Of the held-out rows, where they are sampled and the training rows are not."""


SAMPLES = {
    "top-k": Sample(None),
    "threshold": Sample(InclusionRule((1.0,), (1 / 150,)), most=30, flat=3.0),
    "top-k-sampled": Sample(
        InclusionRule((1.0, 6.0, 2.0), (1 / 10, 1 / 30, 0.0)), most=12, exact=3
    ),
    # Log Z below 0, counts told by what is left at one temperature of three, ranks 1022 and 1023.
    "threshold-of-three": Sample(
        InclusionRule((0.5, 1.0, 2.0), (0.0, 1 / 150, 0.0)), most=30, flat=2.0, seed=1
    ),
    # Sampled runs of more than 255 entries.
    "threshold-long": Sample(InclusionRule((1.0, 2.0), (1 / 100, 1 / 600)), most=5, flat=2.0),
    # Sampled entries whose stored log p is above 0.
    "threshold-coarse": Sample(InclusionRule((1.0,), (0.9,)), most=30),
    # A top-k whose held-out rows have a sampled tail.
    "top-k-heldout": Sample(
        None, most=12, exact=3, noted=True, heldout=InclusionRule((1.0, 2.0), (1 / 20, 1 / 60))
    ),
    # What the writer of the text recorded.
    "top-k-requested": Sample(None, noted=True),
    "threshold-requested": Sample(
        InclusionRule((1.0, 2.0), (1 / 20, 1 / 60)), most=20, flat=3.0, noted=True
    ),
}


def _always_kept_row(rng: np.random.Generator) -> tuple[CachedSequence, Any]:
    """Return a row of the largest 0, 1, 3 or 300 entries a position."""
    grid, length = (1.0, 2.0), int(rng.integers(3, 12))
    ids = rng.integers(0, VOCAB, length).astype(np.int32)
    loss_mask = rng.random(length) < 0.6
    loss_mask[0], loss_mask[-1] = False, True
    where = np.flatnonzero(loss_mask)
    z = rng.normal(0, rng.choice([0.5, 3.0, 8.0], (where.size, 1)), (where.size, VOCAB))
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    counts = rng.choice([0, 1, 3, 300], where.size)
    tops = [np.sort(np.argsort(-p, kind="stable")[:k]) for p, k in zip(log_p, counts, strict=True)]
    values = [p[top] for p, top in zip(log_p, tops, strict=True)]
    log_z = np.stack([np.log(np.exp(log_p / t).sum(1)) for t in grid], 1)
    log_p_t = [log_p / t - log_z[:, [g]] for g, t in enumerate(grid)]
    targets = SparseTargets(
        counts_N=counts.astype(np.int32),
        token_ids_E=np.concatenate(tops).astype(np.int32),
        logprobs_E=np.concatenate(values).astype(np.float32),
        inclusion_E=None,
        temperatures=grid,
        log_z_NG=log_z.astype(np.float32),
        entropy_NG=np.stack([-(np.exp(v) * v).sum(1) for v in log_p_t], 1).astype(np.float32),
        label_logprob_N=log_p[np.arange(where.size), ids[where]].astype(np.float32),
        largest_N=np.where(counts > 0, log_p.argmax(1), -1).astype(np.int32),
    )
    tails = np.array([max(0.0, 1 - np.exp(v).sum()) for v in values], np.float32)
    return CachedSequence(rng.bytes(16).hex(), ids, loss_mask, targets), tails


def _noted(rng: np.random.Generator, row: CachedSequence) -> CachedSequence:
    """Add written log-probs, and to each position the request of 0 to 5 ids, entries among them."""
    targets, counts, ids = row.targets, [], []
    for n in range(targets.num_positions):
        own = targets.entries(n)[0]
        few = rng.choice(own, min(len(own), 2), replace=False).tolist()
        asked = list(dict.fromkeys([*few, *rng.integers(0, VOCAB, 3).tolist()]))
        counts.append(len(asked) if n % 4 else 0)
        ids += asked[: counts[-1]]
    requested = RequestedEntries(
        np.array(counts, np.int32),
        np.array(ids, np.int32),
        -rng.exponential(12, len(ids)).astype(np.float32),
    )
    written_N = -rng.exponential(9, targets.num_positions).astype(np.float32)
    noted = replace(targets, requested=requested, written_logprob_N=written_N)
    return replace(row, targets=noted)


def _write(folder: Path, name: str, sample: Sample) -> None:
    rule = sample.rule
    target, expected_file = folder / f"cache-v1-{name}", folder / f"cache-v1-{name}.expected.json"
    if target.exists() or expected_file.exists():
        raise SystemExit("a frozen sample is never written anew")
    rng = np.random.default_rng(sample.seed)
    spec = CodecSpec(
        VOCAB, rule, written_logprobs=sample.noted, requested_entries=sample.noted,
        largest_known=sample.noted,
    )  # fmt: skip
    if sample.heldout is not None:
        own = replace(spec, rule=sample.heldout, quantisation=HELDOUT_QUANTISATION)
        spec = replace(spec, heldout=own)
    grid = (1.0, 2.0) if rule is None else rule.temperatures
    scheme: dict[str, Any] = {"name": name, "temperatures": list(grid)}
    if rule is not None:
        scheme["taus"] = list(rule.taus)
    identity: dict[str, Any] = {
        "format_version": 1,
        "teacher": {
            "model": "golden", "revision": None, "dtype": "float64", "engine": "numpy",
            "engine_version": "2", "device": "cpu", "batch_tokens": 16,
        },
        "tokenizer": {"vocabulary_sha256": "0" * 64, "size": VOCAB},
        "corpus": {"source": "random"},
        "scheme": scheme, "codec": spec.to_json(), "shard_tokens": 16,
    }  # fmt: skip
    store = Store(str(target))
    store.write("_meta/tokenizer/tokenizer.json", b'{"golden": true}\n')
    for split, shards in SIZES.items():
        own_rule = spec.of_split(split).rule
        for index, number in enumerate(shards):
            made = [
                _always_kept_row(rng)
                if own_rule is None
                else sampled_row(
                    rng, own_rule, vocab=VOCAB, most=sample.most, exact=sample.exact,
                    spread=sample.flat if (split, index) == ("train", 0) else 9.0,
                )
                for _ in range(number)
            ]  # fmt: skip
            kept = [_noted(rng, row) if sample.noted else row for row, _ in made]
            record, data = encode_shard(
                kept, spec, split=split, index=index, temperatures=grid,
                identity_digest=fingerprint(identity), tails=[tails for _, tails in made],
            )  # fmt: skip
            commit_shard(store, record, data)
    finalize(
        store, {split: len(shards) for split, shards in SIZES.items()},
        identity=identity, spec=spec, temperatures=grid,
        corpus_counts={"rows": 5}, tokenizer_files=["tokenizer.json"], command="golden",
    )  # fmt: skip
    cache = open_cache(str(target))
    rows = []
    for split in SIZES:
        source = cache.source(split)
        for shard, count in enumerate(source.shard_rows()):
            for row in source.read_rows(shard, range(count)):
                t = row.targets
                rows.append({
                    "split": split, "shard": shard, "sample_id": row.sample_id,
                    "input_ids": row.input_ids_L.tolist(), "loss_mask": row.loss_mask_L.tolist(),
                    "counts": t.counts_N.tolist(), "token_ids": t.token_ids_E.tolist(),
                    "logprobs": t.logprobs_E.tolist(),
                    "inclusion": None if t.inclusion_E is None else t.inclusion_E.tolist(),
                    "log_z": t.log_z_NG.tolist(), "entropy": t.entropy_NG.tolist(),
                    "label_logprob": t.label_logprob_N.tolist(),
                })  # fmt: skip
                if t.largest_N is not None:
                    rows[-1]["largest"] = t.largest_N.tolist()
                if t.written_logprob_N is not None:
                    rows[-1]["written_logprob"] = t.written_logprob_N.tolist()
    expected_file.write_text(json.dumps({"rows": _rounded(rows)}), encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Return the same with numbers of 8 digits, which float32 has not all of."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def main(folder: Path, names: Sequence[str]) -> None:
    """Write the caches and what a reader must find in them."""
    for name in names or SAMPLES:
        _write(folder, name, SAMPLES[name])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
