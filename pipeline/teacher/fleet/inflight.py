"""In-flight marker: the row that the engine was given, for whoever comes after a crash."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.errors import ModelError, StoreError
from pipeline.storage import Store
from pipeline.teacher.fleet.leases import marker_name

__all__ = ["InFlightMarker", "row_after_row"]

_log = logging.getLogger(__name__)


class _Row(Protocol):
    @property
    def row_id(self) -> str: ...


R = TypeVar("R", bound=_Row)


@dataclass(slots=True)
class InFlightMarker:
    """The marker of one shard."""

    store: Store
    shard: str
    at: int = 0
    """The row's place in the shard; all before it have been answered or are in `dead`."""
    tries: int = 0
    """How often the row at `at` was handed to the engine and no word came back."""
    dead: tuple[str, ...] = ()
    """Rows that took `tries` processes with them."""

    @property
    def _name(self) -> str:
        return marker_name(self.shard)

    def read(self) -> None:
        """Take up what a process before this one left."""
        try:
            data = json.loads(self.store.read(self._name))
            self.at, self.tries = int(data["at"]), int(data["tries"])
            self.dead = tuple(map(str, data["dead"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            self.at, self.tries, self.dead = 0, 0, ()

    def put(self, at: int, tries: int) -> None:
        """Write it down before the engine gets the row."""
        self.at, self.tries = at, tries
        data = {"at": at, "tries": tries, "dead": list(self.dead)}
        self.store.write(self._name, json.dumps(data).encode())

    def take_back(self) -> None:
        """The process goes on living: the last hand-over killed nobody."""
        data = {"at": self.at, "tries": max(self.tries - 1, 0), "dead": list(self.dead)}
        try:
            self.store.write(self._name, json.dumps(data).encode(), once=True)
        except StoreError:
            _log.debug("the in-flight marker of %s is one try too high", self.shard)


def row_after_row(
    rows: Sequence[R],
    marker: InFlightMarker,
    quarantined: dict[str, QuarantinedRow],
    *,
    tries: int,
    hand_over: Callable[[R], None],
    remedy: str,
) -> None:
    """Hand a teacher row after row; of a row that kills the process, the marker is left.

    After the last row, the shard as one is the thing that may kill.

    Args:
        rows: of the shard.
        marker: of the shard; what an earlier process left is taken up.
        quarantined: rows left out from the start, by id; those that kill are added.
        tries: how many processes a row may take with it.
        hand_over: gives the teacher one row; returns where the process goes on living.
        remedy: what helps where none of the rows kills alone.

    Raises:
        ModelError: the shard as one has ended so many processes, and none of its rows has.
    """
    marker.read()
    first, tries_there = marker.at, marker.tries
    for index in range(first, len(rows) + 1):
        if index < len(rows) and rows[index].row_id in quarantined:
            continue
        tried = tries_there if index == first else 0
        if tried >= tries:
            if index == len(rows):
                raise ModelError(
                    f"shard {marker.shard} ended its process {tried} times, though none of its "
                    "rows does alone",
                    do=remedy,
                )
            marker.dead = (*marker.dead, rows[index].row_id)
            continue
        marker.put(index, tried + 1)
        if index < len(rows):
            hand_over(rows[index])
    for name in marker.dead:
        quarantined[name] = QuarantinedRow(name, "the process died while the engine had it", tries)
        _log.warning("%s is quarantined: %s", name, quarantined[name].error)
