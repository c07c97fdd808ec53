"""The list of a shard's quarantined rows: all workers agree on one, within the limit of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pipeline.cache.layout.quarantine import (
    QuarantinedRow,
    quarantine_name,
    quarantine_rows,
    read_quarantine,
    read_quarantined_rows,
)
from pipeline.errors import ModelError
from pipeline.storage import Store
from pipeline.teacher.fleet.quarantine import Answered

__all__ = ["QuarantineLists"]


class QuarantineLists:
    """The lists of one cache, as one worker reads and writes them."""

    def __init__(
        self, store: Store, *, planned_rows: Callable[[], int], max_fraction: float
    ) -> None:
        """Keep the parts.

        Args:
            store: the cache's root.
            planned_rows: of all shards, projected while not all are known.
            max_fraction: how many of these may be quarantined; one in any case.
        """
        self._store = store
        self._planned_rows = planned_rows
        self._max_fraction = max_fraction

    def read(self, shard: str) -> tuple[QuarantinedRow, ...]:
        """Return the rows of a shard that are quarantined already."""
        return read_quarantined_rows(self._store, shard)

    def settle(self, shard: str, known: Sequence[QuarantinedRow], answered: Answered) -> bool:
        """Make the rows that failed the shard's list; False where another worker's came first.

        Args:
            shard: its name.
            known: the list that the engine's call went by.
            answered: what came of it.

        Raises:
            ModelError: more rows of the plan are quarantined than the run allows.
        """
        if answered.quarantined_ids == _ids(known):
            return True
        self._check_limit(shard, answered.quarantined)
        return quarantine_rows(self._store, shard, answered.quarantined)

    def read_other(self, shard: str, answered: Answered) -> tuple[QuarantinedRow, ...]:
        """Return the list that came first, which the next call goes by.

        It may be that of a worker that died before its record, for which fewer rows failed: then
        none of it is kept, and the next call starts without a list.
        """
        known = read_quarantined_rows(self._store, shard)
        if _ids(known) < answered.quarantined_ids:
            self._store.delete(quarantine_name(shard))
            return ()
        return known

    def contradicts(self, shard: str, answered: Answered) -> bool:
        """Return whether the list now names other rows than those that these columns go without."""
        return _ids(read_quarantined_rows(self._store, shard)) != answered.quarantined_ids

    def _check_limit(self, shard: str, rows: Sequence[QuarantinedRow]) -> None:
        others = read_quarantine(self._store)
        # The shard's own list may be an earlier attempt's: its rows are among `rows`.
        others.pop(shard, None)
        count = len(rows) + sum(map(len, others.values()))
        planned = self._planned_rows()
        most = max(1, math.floor(self._max_fraction * planned))
        if count > most:
            raise ModelError(
                f"{count} of {planned} rows fail, the last of them sample "
                f"{rows[-1].sample_id} of {shard}: {rows[-1].error}",
                expected=f"at most {most} (capture.max_quarantined_fraction)",
                do="mend the teacher or the engine, or allow more; finished shards are kept",
            )


def _ids(rows: Sequence[QuarantinedRow]) -> frozenset[str]:
    return frozenset(row.sample_id for row in rows)
