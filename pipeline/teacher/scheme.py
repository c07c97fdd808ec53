"""The capture settings as a scheme and its codec: what is certain, drawn, and how stored."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pipeline.cache.codec import CodecSpec
from pipeline.cache.law import SamplingLaw
from pipeline.cache.ranked import RankedSpec, rank_order
from pipeline.cache.schema import Spec
from pipeline.corpus.sample import Sample
from pipeline.teacher.settings import CaptureSettings
from pipeline.teacher.sparsify import SparseScheme

__all__ = ["capture_scheme", "codec_spec"]

_TAU_ALONE = 1 / 30
_TAU_BESIDE = (1 / 12, 1 / 25)
"""At T = 1 beside another temperature, and at that one: `make bench-fidelity` has the trade-off."""
_ORDER_TOKENS = 1 << 22
"""The order of the vocabulary is that of so many of the corpus's first tokens: more change no byte
in a hundred, and every worker counts them."""


def capture_scheme(settings: CaptureSettings) -> SparseScheme:
    """Return the scheme that the settings describe; `calibrate.py` scales it to `mean_entries`."""
    grid = settings.temperatures
    if settings.scheme == "top_k":
        return SparseScheme(settings.top_k, grid)
    taus = settings.tau or _default_taus(grid)
    return SparseScheme(
        settings.top_k if settings.scheme == "top_k_sampled" else 0,
        grid,
        SamplingLaw(grid, taus),
        mean_entries=settings.mean_entries,
        taus_before=() if settings.mean_entries is None else taus,
    )


def codec_spec(scheme: SparseScheme, vocab_size: int, samples: Iterable[Sample] | None) -> Spec:
    """Return the codec for the scheme's targets.

    Args:
        scheme: decides between the layouts: only one of them holds drawn entries.
        vocab_size: rows of the teacher's head.
        samples: of the corpus, whose frequent tokens get short ids; None while it is not known.
    """
    if scheme.law is None:
        return CodecSpec(vocab_size=vocab_size)
    if samples is None:
        return RankedSpec(vocab_size, scheme.law, grids=scheme.grids)
    counts_V = np.zeros(vocab_size, np.int64)
    seen = 0
    for sample in samples:
        counts_V += np.bincount(sample.input_ids, minlength=vocab_size)
        seen += int(sample.input_ids.size)
        if seen >= _ORDER_TOKENS:
            break
    return RankedSpec(vocab_size, scheme.law, rank_order(counts_V), scheme.grids)


def _default_taus(grid: tuple[float, ...]) -> tuple[float, ...]:
    """One temperature: its own tau. Several: 1 and the largest are drawn for, the rest profits."""
    highest = max(grid)
    if highest == 1.0:
        return tuple(_TAU_ALONE if value == 1.0 else 0.0 for value in grid)
    beside = {1.0: _TAU_BESIDE[0], highest: _TAU_BESIDE[1]}
    return tuple(beside.get(value, 0.0) for value in grid)
