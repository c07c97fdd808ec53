"""The plan of a run: of one cache, or of a mixture."""

from __future__ import annotations

from functools import partial

from pipeline.data.mixture.rows import mixture_of
from pipeline.data.order.mixed_plan import MixedPlan
from pipeline.data.order.plan import TrainPlan
from pipeline.data.order.totals import SplitTotals
from pipeline.data.settings import DataSettings
from pipeline.data.source import RowSource

__all__ = ["make_plan"]


def make_plan(
    source: RowSource,
    settings: DataSettings,
    *,
    seed: int,
    packs_per_step: int,
    pack_length: int,
    totals: SplitTotals | None = None,
) -> TrainPlan | MixedPlan:
    """Plan a run from the lengths of rows; reads no row.

    Args:
        source: the training rows.
        settings: packing, shuffling, lanes.
        seed: of the order.
        packs_per_step: over all ranks and micro-batches; of no effect with
            `settings.batch_tokens`.
        pack_length: the cache's max_length; `settings.pack_length` goes before it.
        totals: of the source, where they are known.

    Raises:
        CacheError: no rows.
        ConfigError: a row longer than a pack, or than a third of the budget of tokens.
    """
    mixture = mixture_of(source)
    plan = TrainPlan if mixture is None else partial(MixedPlan, mixture=mixture)
    return plan(
        source,
        seed=seed,
        packs_per_step=packs_per_step,
        pack_length=settings.pack_length or pack_length,
        shuffle_shards=settings.shuffle_shards,
        lanes=settings.lanes,
        packing=settings.packing,
        batch_tokens=settings.batch_tokens,
        totals=totals,
    )
