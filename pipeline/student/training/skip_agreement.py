"""All ranks skip the same damaged shards from the same step on, and write down which."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.stream.skipped_shards import SkippedShard, write_skipped_shards
from pipeline.data.stream.train_stream import TrainStream
from pipeline.student.training.deepspeed_engine import DeepSpeedEngine

__all__ = ["SkipAgreement"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SkipAgreement:
    """What the ranks need to agree on the shards of a step."""

    engine: DeepSpeedEngine
    stream: TrainStream
    folder: Path
    """The run's."""
    shown: Callable[[str], str]
    """The full address of a shard's file in the cache, for messages."""

    def agree(self, found: Sequence[SkippedShard]) -> Sequence[SkippedShard]:
        """Return what any rank found damaged, once it is written down.

        Written before the step: killed after it, the run skips the same from the same step.
        """
        if not self.engine.sum_over_ranks([float(len(found))])[0]:
            return ()
        every = sorted({r for part in self.engine.gather_objects(list(found)) for r in part})
        records = list({record.shard: record for record in reversed(every)}.values())
        if self.engine.distributed.is_first:
            write_skipped_shards(self.folder, [*self.stream.skipped_shards, *records])
            for record in records:
                _log.warning(
                    "%s is damaged (%s): its %d rows are skipped from step %d on",
                    self.shown(record.path),
                    record.reason,
                    record.rows,
                    record.from_step + 1,
                )
        return records
