"""Reading fewer entries: the largest of a top-k, and unbiased subsamples of sampled targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.codec.subsample import EntryLimit
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.writer import encode_shard
from pipeline.cache.layout.schema import table_to_rows
from pipeline.errors import CacheError
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.quantisation import rounding_log_bias
from tests.unit.cache.sample_cache import write_cache
from tests.unit.cache.sampled_cache import GRID, RULES, sampled_row, write_sampled_cache


def _estimate(row: CachedSequence, temperature: float, vocab: int) -> np.ndarray:
    """Return the unbiased estimate of p_T summed over the row's positions, dense [V]."""
    targets = row.targets
    owner_E = np.repeat(np.arange(targets.num_positions), targets.counts_N)
    column = targets.temperatures.index(temperature)
    log_p_E = targets.logprobs_E.astype(np.float64) / temperature
    log_p_E -= targets.log_z_NG[owner_E, column]
    assert targets.inclusion_E is not None
    sampled_E = targets.inclusion_E < 1
    log_p_E[sampled_E] -= rounding_log_bias(targets.sampled_step, temperature)
    weights_E = np.exp(log_p_E) / targets.inclusion_E
    return np.bincount(targets.token_ids_E, weights_E, minlength=vocab)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("exact", [0, 4])
def test_subsampling_is_unbiased(rule: InclusionRule, exact: int) -> None:
    """One captured row under many sample ids, so that only the subsampling differs."""
    vocab, copies = 60, 3000
    spec = CodecSpec(vocab, rule)
    # A finer grid of always-kept values, so that their rounding does not hide a bias.
    row, tail_N = sampled_row(np.random.default_rng(5), rule, vocab=vocab, most=6, exact=exact)
    while not row.targets.num_positions:
        row, tail_N = sampled_row(np.random.default_rng(9), rule, vocab=vocab, most=6, exact=exact)
    sampled_E = row.targets.inclusion_E < 1  # type: ignore[operator]
    # Always-kept entries only: both their subsampling and their dither depend on the sample's id.
    owner_E = np.repeat(np.arange(row.targets.num_positions), row.targets.counts_N)
    counts_N = np.bincount(owner_E[~sampled_E]).astype(np.int32)
    always_kept = replace(
        row.targets,
        counts_N=counts_N,
        token_ids_E=row.targets.token_ids_E[~sampled_E],
        logprobs_E=row.targets.logprobs_E[~sampled_E],
        inclusion_E=row.targets.inclusion_E[~sampled_E],  # type: ignore[index]
    )
    rng = np.random.default_rng(0)
    rows = [replace(row, sample_id=rng.bytes(16).hex(), targets=always_kept) for _ in range(copies)]
    _, data = encode_shard(
        rows, spec, split="train", index=0, temperatures=GRID, identity_digest="0" * 64,
        tails=[tail_N] * copies,
    )  # fmt: skip
    table = pq.read_table(pa.BufferReader(data))
    whole = table_to_rows(table.slice(0, 1), spec, GRID)[0]
    subsampled = table_to_rows(table, spec, GRID, EntryLimit(tau_factor=4))
    fewer = np.mean([subsample.targets.token_ids_E.size for subsample in subsampled])
    assert fewer < 0.9 * whole.targets.token_ids_E.size
    for temperature in GRID:
        wanted_V = _estimate(whole, temperature, vocab)
        estimates_RV = np.array(
            [_estimate(subsample, temperature, vocab) for subsample in subsampled]
        )
        error_V = estimates_RV.mean(0) - wanted_V
        noise_V = estimates_RV.std(0) / np.sqrt(copies)
        assert (np.abs(error_V) <= 5 * noise_V + 1e-6).all()


def test_sampled_entries_stay_with_the_ratio_of_the_rules() -> None:
    rule = RULES[1]
    spec = CodecSpec(500, rule)
    rng = np.random.default_rng(1)
    rows, tails = zip(*(sampled_row(rng, rule) for _ in range(60)), strict=True)
    _, data = encode_shard(
        list(rows), spec, split="train", index=0, temperatures=GRID, identity_digest="0" * 64,
        tails=list(tails),
    )  # fmt: skip
    table = pq.read_table(pa.BufferReader(data))
    kept = {}
    for factor in (1.0, 2.0, 5.0):
        got = table_to_rows(table, spec, GRID, EntryLimit(tau_factor=factor))
        again = table_to_rows(table, spec, GRID, EntryLimit(tau_factor=factor))
        assert again[3].targets.counts_N.tolist() == got[3].targets.counts_N.tolist()
        kept[factor] = [
            {
                (n, int(token))
                for n, token in zip(
                    np.repeat(np.arange(r.targets.num_positions), r.targets.counts_N),
                    r.targets.token_ids_E,
                    strict=True,
                )
            }
            for r in got
        ]
        for row in got:
            label = row.input_ids_L[row.loss_mask_L]
            first = np.cumsum(row.targets.counts_N) - row.targets.counts_N
            assert row.targets.token_ids_E[first].tolist() == label.tolist()
    for one, two, five in zip(kept[1.0], kept[2.0], kept[5.0], strict=True):
        assert five <= two <= one
    whole, half = (sum(map(len, kept[factor])) for factor in (1.0, 2.0))
    assert 0.45 * whole < half < 0.75 * whole


def test_a_top_k_is_read_with_fewer_entries(made: Path) -> None:
    cache = open_cache(str(made))
    whole = cache.source("train").read_rows(0, range(5))
    for row, wanted in zip(
        cache.source("train", top_k=2).read_rows(0, range(5)), whole, strict=True
    ):
        assert row.targets.counts_N.tolist() == np.minimum(wanted.targets.counts_N, 2).tolist()
        assert row.targets.log_z_NG.tolist() == wanted.targets.log_z_NG.tolist()
        ends, full = np.cumsum(row.targets.counts_N), np.cumsum(wanted.targets.counts_N)
        for n, (end, full_end) in enumerate(zip(ends, full, strict=True)):
            got = row.targets.token_ids_E[end - row.targets.counts_N[n] : end]
            some = slice(full_end - wanted.targets.counts_N[n], full_end)
            # The grid may order two entries of nearly equal p otherwise.
            largest = np.sort(wanted.targets.logprobs_E[some])[::-1][:2]
            found = [
                value
                for token, value in zip(
                    wanted.targets.token_ids_E[some], wanted.targets.logprobs_E[some], strict=True
                )
                if token in got
            ]
            np.testing.assert_allclose(np.sort(found)[::-1], largest, atol=0.7)


@pytest.mark.parametrize(
    ("sampled", "asked", "found"),
    [
        (
            False,
            {"top_k": 7},
            "holds 6 entries a position, 7 requested; expected a top_k of 1 to 6",
        ),
        (False, {"tau_factor": 2.0}, "its entries were not sampled"),
        (True, {"top_k": 3}, "holds sampled targets, of which the largest"),
        (True, {"tau_factor": 0.5}, "expected at least 1"),
        (True, {"tau_factor": 12.5}, "below 12"),
    ],
)
def test_more_than_a_cache_holds_is_refused(
    tmp_path: Path, sampled: bool, asked: dict[str, float], found: str
) -> None:
    url = str(tmp_path / "cache")
    (write_sampled_cache if sampled else write_cache)(url)
    with pytest.raises(CacheError, match=found):
        open_cache(url).source("train", **asked)  # type: ignore[arg-type]


def test_the_exact_top_k_stays_when_its_cache_is_subsampled() -> None:
    """Of a flat distribution: by the rule alone none of these entries would be always kept."""
    rule, exact = RULES[1], 4
    spec = CodecSpec(500, rule)
    rng = np.random.default_rng(2)
    rows, tails = zip(*(sampled_row(rng, rule, exact=exact, spread=0.5) for _ in range(8)),
                      strict=True)  # fmt: skip
    _, data = encode_shard(
        list(rows), spec, split="train", index=0, temperatures=GRID, identity_digest="0" * 64,
        tails=list(tails),
    )  # fmt: skip
    table = pq.read_table(pa.BufferReader(data))
    for factor in (1.5, 4.0):
        fewer = table_to_rows(table, spec, GRID, EntryLimit(tau_factor=factor))
        for before, after in zip(table_to_rows(table, spec, GRID), fewer, strict=True):
            assert _always_kept(before) == _always_kept(after)
    assert sum(len(_always_kept(row)) for row in rows) >= exact * 20


def _always_kept(row: CachedSequence) -> list[tuple[int, int, float]]:
    targets = row.targets
    owner_E = np.repeat(np.arange(targets.num_positions), targets.counts_N)
    kept_E = targets.inclusion_E == 1
    return [
        (int(n), int(token), float(value))
        for n, token, value in zip(
            owner_E[kept_E], targets.token_ids_E[kept_E], targets.logprobs_E[kept_E], strict=True
        )
    ]
