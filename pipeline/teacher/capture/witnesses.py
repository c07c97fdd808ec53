"""A few short rows of other shards, which tell a bad shard from a bad engine."""

from __future__ import annotations

from pipeline.cache.layout.names import RECORDS
from pipeline.cache.layout.recorded import Recorded
from pipeline.storage import Store
from pipeline.teacher.capture.plan import PlannedShard
from pipeline.teacher.capture.source import ShardSource
from pipeline.teacher.engines.base import CaptureRequest

__all__ = ["Witnesses"]

_SHARDS = 3
_ROWS = 3


class Witnesses:
    """Picks rows besides those of the shard that is being captured."""

    def __init__(self, store: Store, source: ShardSource) -> None:
        """Keep the parts; nothing is read before it is asked for."""
        self._store = store
        self._source = source
        self.current: PlannedShard | None = None

    def any_rows(self) -> list[CaptureRequest]:
        """Return rows of finished shards if there are any, else of others."""
        return self.harmless_rows() or self._rows(finished=False)

    def harmless_rows(self) -> list[CaptureRequest]:
        """Return rows of finished shards: they have harmed nobody."""
        return self._rows(finished=True)

    def _rows(self, *, finished: bool) -> list[CaptureRequest]:
        recorded = Recorded(self._store.list(RECORDS))
        shards = [
            shard
            for shard in self._source.shards
            if shard is not self.current and (shard.key in recorded) == finished
        ]
        rows = [request for shard in shards[:_SHARDS] for request in shard.requests()]
        return sorted(rows, key=lambda request: request.input_ids_L.size)[:_ROWS]
