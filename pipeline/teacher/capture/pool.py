"""The shards of a cache as work of the fleet: which are known, which recorded; records folded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.cache.layout.fold import fold
from pipeline.cache.layout.names import RECORDS, SEGMENT_SHARDS, SPLITS, SegmentName, shard_name
from pipeline.cache.layout.recorded import Recorded
from pipeline.observe.shares import Shares
from pipeline.progress import Progress
from pipeline.teacher.capture.plan import PlannedShard
from pipeline.teacher.capture.source import ShardSource
from pipeline.teacher.fleet.leases import LeaseBoard

__all__ = ["ShardPool"]


class ShardPool:
    """The shards that are known, looked at by one listing of the records."""

    def __init__(
        self,
        source: ShardSource,
        board: LeaseBoard,
        progress: Progress,
        shares: Shares,
        *,
        on_complete: Callable[[], None],
    ) -> None:
        """Look at nothing yet; `on_complete` is called once all shards are known."""
        self._on_complete = on_complete
        self._was_complete = False
        self._source = source
        self._board = board
        self._store = board.store
        self._progress = progress
        self._shares = shares
        self._seen: set[tuple[str, int]] | None = None
        self.bytes_per_token = 0.0
        """Of the largest shard that was there at first, on a disk that can be full; else 0."""

    @property
    def total(self) -> int:
        """The shards that are known."""
        return len(self._source.shards)

    @property
    def is_complete(self) -> bool:
        """Whether all shards are known."""
        return self._source.is_complete

    def missing(self, *, look: bool = True) -> list[PlannedShard]:
        """Return the known shards without a record, in their order."""
        if look:
            self._source.refresh()
        if self._source.is_complete and not self._was_complete:
            self._was_complete = True
            self._on_complete()
        shards = self._source.shards
        files = self._store.list(RECORDS)
        recorded = Recorded(files)
        self._fold(files)
        tokens = self._source.projected().tokens
        self._progress.retarget(tokens)
        self._shares.level(planned_tokens=tokens)
        self._count_before(shards, recorded)
        return [shard for shard in shards if shard.key not in recorded]

    def _count_before(self, shards: Sequence[PlannedShard], recorded: Recorded) -> None:
        """Count what was there when this worker came, once its tokens are known."""
        if self._seen is None:
            self._seen = {(s.split, i) for s in recorded.segments for i in s.shards}
            self._measure(shards, recorded)
        if not self._seen:
            return
        for shard in shards:
            if shard.key in self._seen:
                self._seen.discard(shard.key)
                self._progress.count_before(shard.num_tokens)

    def _measure(self, shards: Sequence[PlannedShard], recorded: Recorded) -> None:
        if not self._store.is_local:
            return
        sizes = {split: self._store.sizes(f"data/{split}") for split in SPLITS}
        for shard in shards:
            size = sizes[shard.split].get(shard_name(*shard.key).rsplit("/", 1)[-1])
            if size and shard.num_tokens and shard.key in recorded:
                self.bytes_per_token = max(self.bytes_per_token, size / shard.num_tokens)

    def _fold(self, files: Sequence[str]) -> None:
        """Fold the records of full segments, of which this worker gets the lease."""
        found = foldable(files)
        newest = self._board.attempts() if found else {}
        for block in found:
            name = f"fold-{block.split}-{block.first:05d}"
            lease = self._board.try_lease(name, newest.get(name))  # of a dead worker as well
            if lease is not None:
                fold(self._store, block)
                self._board.done(lease)


def foldable(files: Sequence[str]) -> list[SegmentName]:
    """Return the blocks of which every record is there, not yet in one file."""
    recorded = Recorded(files)
    pieces: dict[tuple[str, int], int] = {}
    for item in recorded.segments:
        key = item.split, item.first // SEGMENT_SHARDS
        pieces[key] = pieces.get(key, 0) + 1
    found = []
    for (split, number), count in pieces.items():
        first = number * SEGMENT_SHARDS
        block = SegmentName(split, first, first + SEGMENT_SHARDS - 1)
        if count > 1 and all((split, index) in recorded for index in block.shards):
            found.append(block)
    return found
