"""Sampled targets of random distributions, as the sparsifier samples, and caches of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.cache.io.finalize import finalize
from pipeline.cache.io.writer import commit_shard, encode_shard
from pipeline.cache.layout.manifest import Manifest
from pipeline.config import fingerprint
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.noise import dither, row_noise, sample_key
from pipeline.storage import Store
from tests.unit.cache.sample_cache import SIZES, sample_identity

GRID = (1.0, 2.0)
VOCAB = 500
RULES = (InclusionRule(GRID, (1 / 10, 0.0)), InclusionRule(GRID, (1 / 12, 1 / 25)))


def sampled_row(
    rng: np.random.Generator,
    rule: InclusionRule,
    *,
    vocab: int = VOCAB,
    most: int = 40,
    exact: int = 0,
    spread: float = 3.0,
) -> tuple[CachedSequence, NDArray[np.float32]]:
    """Return a row of 2 to `most` tokens and its tails; the `exact` largest are always kept.

    `spread` is the standard deviation of the logits.
    """
    spec = CodecSpec(vocab, rule)
    quantisation, grid = spec.quantisation, rule.temperatures
    length = int(rng.integers(2, most))
    loss_mask_L = rng.random(length) < 0.6
    loss_mask_L[0] = False
    ids_L = rng.integers(0, vocab, length).astype(np.int32)
    name = rng.bytes(16).hex()
    rows_N = np.flatnonzero(loss_mask_L) - 1
    noise_N = row_noise(sample_key(name), rows_N)
    counts, ids, logprobs, inclusion, log_z_NG, label_N = [], [], [], [], [], []
    largest: list[int] = []
    for n, token in enumerate(ids_L[loss_mask_L]):
        z = rng.normal(0, spread, vocab)
        log_p_V = z - np.log(np.exp(z).sum())
        steps = np.rint(np.log([np.exp(log_p_V / t).sum() for t in grid]) / quantisation.log_z_step)
        log_z_G = steps * quantisation.log_z_step
        log_z_VG = np.broadcast_to(log_z_G, (vocab, len(grid)))
        always_kept_V = rule.ratio(log_p_V, log_z_VG) >= 1
        always_kept_V[np.argsort(-log_p_V)[:exact]] = True
        dither_V = np.full(vocab, dither(noise_N)[n])
        sampled_V = quantisation.sampled_value(
            quantisation.sampled_code(log_p_V, dither_V), dither_V
        )
        pi_V = rule.inclusion(sampled_V, log_z_VG)
        kept_V = (rng.random(vocab) < pi_V) & ~always_kept_V
        always_kept_V[token] = True
        largest.append(int(np.where(always_kept_V, log_p_V, -np.inf).argmax()))
        always_kept_V[token] = kept_V[token] = False
        for chosen_V, values_V, pis_V in (
            (always_kept_V, log_p_V, np.ones(vocab)), (kept_V, sampled_V, pi_V)
        ):  # fmt: skip
            places = np.flatnonzero(chosen_V)
            if chosen_V is always_kept_V:
                places = np.concatenate([[token], places])
            ids += places.tolist()
            logprobs += values_V[places].tolist()
            inclusion += pis_V[places].tolist()
        counts.append(len(ids) - sum(counts))
        log_z_NG.append(log_z_G)
        label_N.append(log_p_V[token])
    shape = (len(counts), len(grid))
    targets = SparseTargets(
        counts_N=np.array(counts, np.int32),
        token_ids_E=np.array(ids, np.int32),
        logprobs_E=np.array(logprobs, np.float32),
        inclusion_E=np.array(inclusion, np.float32),
        temperatures=grid,
        log_z_NG=np.array(log_z_NG, np.float32).reshape(shape),
        entropy_NG=np.array(log_z_NG, np.float32).reshape(shape) + 1,
        label_logprob_N=np.array(label_N, np.float32),
        sampled_step=quantisation.sampled_step,
        largest_N=np.array(largest, np.int32),
    )
    return CachedSequence(name, ids_L, loss_mask_L, targets), np.zeros(len(counts), np.float32)


def sampled_rows(
    number: int, seed: int, rule: InclusionRule, **shape: Any
) -> tuple[list[CachedSequence], list[NDArray[np.float32]]]:
    """Return rows and their tails; the same for the same seed."""
    rng = np.random.default_rng(seed)
    made = [sampled_row(rng, rule, **shape) for _ in range(number)]
    return [row for row, _ in made], [tail for _, tail in made]


def write_sampled_cache(url: str, rule: InclusionRule = RULES[1]) -> Manifest:
    """Write a complete cache of three shards and ten rows."""
    spec = CodecSpec(VOCAB, rule)
    scheme: dict[str, Any] = {
        "name": "threshold", "temperatures": list(GRID), "taus": list(rule.taus)
    }  # fmt: skip
    identity = sample_identity(scheme=scheme, codec=spec.to_json())
    store = Store(url)
    for split, index, number in SIZES:
        rows, tails = sampled_rows(number, 100 * (split == "heldout") + index, rule)
        record, data = encode_shard(
            rows, spec, split=split, index=index, temperatures=GRID,
            identity_digest=fingerprint(identity), tails=tails,
        )  # fmt: skip
        commit_shard(store, record, data)
    store.write("_meta/tokenizer/tokenizer.json", b'{"model": {"vocab": {"a": 0, "b": 1}}}')
    return finalize(
        store, Counter(split for split, _, _ in SIZES),
        identity=identity, spec=spec, temperatures=GRID,
        corpus_counts={"rows": 10}, tokenizer_files=["tokenizer.json"], command="made by a test",
    )  # fmt: skip
