"""In-flight marker: the row that the engine was given, for whoever comes after a crash."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

from pipeline.errors import StoreError
from pipeline.storage import Store
from pipeline.teacher.fleet.leases import marker_name

__all__ = ["InFlightMarker"]

_log = logging.getLogger(__name__)


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
