"""A note on the store: which row an engine has in its hands, for whoever comes after a crash."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

from pipeline.errors import StoreError
from pipeline.storage import Store
from pipeline.teacher.fleet.leases import breadcrumb_name

__all__ = ["Breadcrumb"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Breadcrumb:
    """The note of one shard."""

    store: Store
    shard: str
    at: int = 0
    """The row, counted in the plan; all before it have been answered or are in `dead`."""
    tries: int = 0
    """How often the row at `at` was handed to the engine and no word came back."""
    dead: tuple[str, ...] = ()
    """Rows that took `tries` processes with them."""

    @property
    def _name(self) -> str:
        return breadcrumb_name(self.shard)

    def read(self) -> None:
        """Take up what a process before this one left."""
        try:
            data = json.loads(self.store.read(self._name))
            self.at, self.tries = int(data["at"]), int(data["tries"])
            self.dead = tuple(map(str, data["dead"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            self.at, self.tries, self.dead = 0, 0, ()

    def drop(self, at: int, tries: int) -> None:
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
            _log.debug("the breadcrumb of %s counts one try too many", self.shard)
