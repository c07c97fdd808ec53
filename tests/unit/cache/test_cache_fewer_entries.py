"""Fewer entries of a position: each is drawn by itself, and none's mass is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.cache.codec.encode import Run
from pipeline.cache.codec.subsample import _uniform
from pipeline.cache.io.reader import open_cache
from tests.unit.cache.sample_cache import write_cache


def test_every_entry_has_a_number_of_its_own() -> None:
    """Were it one a position, likelier entries would stay whenever less likely ones do."""
    counts_N = np.full(400, 3)
    ids_E = np.tile(np.array([5, 6, 900], np.int32), 400)
    run = Run(counts_N, ids_E, np.zeros(1200, np.uint8))
    drawn_NK = _uniform(run, np.arange(400, dtype=np.int64) << 20).reshape(400, 3)
    assert np.unique(drawn_NK).size == drawn_NK.size
    assert np.abs(np.corrcoef(drawn_NK.T)[np.triu_indices(3, 1)]).max() < 0.2
    assert abs(drawn_NK.mean() - 0.5) < 0.05


def test_what_is_left_out_of_a_top_k_joins_the_rest(tmp_path: Path) -> None:
    """The largest entry is read as what the others and the rest leave, within its grid step."""
    url = str(tmp_path / "cache")
    write_cache(url)
    cache = open_cache(url)
    seen = 0
    for whole, fewer in zip(cache.rows("train"), cache.rows("train", top_k=2), strict=True):
        first, at = 0, 0
        for count, left in zip(whole.targets.counts_N, fewer.targets.counts_N, strict=True):
            before = whole.targets.logprobs_E[first : first + count]
            after = fewer.targets.logprobs_E[at : at + left]
            if left:
                seen += 1
                # All that is known is the same: 1 = the entries + the rest, off by the codes alone.
                assert abs(np.exp(after.max()) - np.exp(before.max())) < 0.02
            first, at = first + count, at + left
    assert seen > 20
