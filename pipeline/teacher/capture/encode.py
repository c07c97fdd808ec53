"""A shard's columns to the bytes of its file."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.writer import encode_shard
from pipeline.cache.layout.records import ShardRecord
from pipeline.teacher.capture.plan import PlannedShard
from pipeline.teacher.capture.task import CaptureTask
from pipeline.teacher.sparsify.columns import to_targets

__all__ = ["encode_columns"]


def encode_columns(
    task: CaptureTask,
    shard: PlannedShard,
    columns: Sequence[NDArray[np.float32]],
    quarantined: Collection[str] = (),
) -> tuple[ShardRecord, bytes]:
    """Return record and file of a shard.

    Args:
        task: scheme, codec and identity.
        shard: which samples.
        columns: of the samples that are not quarantined, in order.
        quarantined: ids of the samples that the shard goes without.

    Raises:
        ModelError: columns are not finite.
    """
    rows: list[CachedSequence] = []
    tails: list[NDArray[np.float32]] = []
    answered = [sample for sample in shard.samples if sample.sample_id not in quarantined]
    for sample, columns_NC in zip(answered, columns, strict=True):
        targets, tail_N = to_targets(
            columns_NC,
            task.scheme.of_split(shard.split),
            sample_id=sample.sample_id,
            label_N=sample.input_ids[sample.loss_mask],
            rows_N=np.flatnonzero(sample.loss_mask) - 1,
            written=sample.written,
        )
        rows.append(CachedSequence(sample.sample_id, sample.input_ids, sample.loss_mask, targets))
        tails.append(tail_N)
    return encode_shard(
        rows,
        task.spec,
        split=shard.split,
        index=shard.index,
        temperatures=task.scheme.temperatures,
        identity_digest=task.identity_digest,
        source_xxh3_128=shard.source.source_xxh3_128,
        rows_quarantined=len(quarantined),
        tails=tails,
    )
