"""What became of each run of a sweep: one small file, replaced at every change."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.data.settings import Teachers
from pipeline.errors import ConfigError
from pipeline.storage import Store

__all__ = ["LEDGER_FILE", "Entry", "Ledger", "State", "read_inventory"]

LEDGER_FILE = "sweep.json"
_FORMAT = 1

State = Literal["waiting", "running", "finished", "pruned", "failed"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One run."""

    name: str
    label: str
    values: dict[str, Any]
    """The changed fields, by dotted name."""
    state: State = "waiting"
    objective: float | None = None
    """None as well where it is not finite; `error` says so then."""
    seconds: float | None = None
    """Wall time of all its processes."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Ledger:
    """A sweep and its runs, in the order they were planned."""

    name: str
    file: str
    """Path of the sweep file, as it was given."""
    cache_dir: str | list[dict[str, Any]]
    """As a configuration has it: an address, or the caches of a mixture."""
    objective: str
    maximize: bool
    fields: tuple[str, ...]
    command: str
    entries: tuple[Entry, ...] = field(default=())
    teachers: Teachers = "each"
    """Of a mixture, see `data.teachers`."""

    def with_entry(self, entry: Entry) -> Ledger:
        """Return the ledger with this run's entry replaced, or added at the end."""
        names = [old.name for old in self.entries]
        if entry.name not in names:
            return replace(self, entries=(*self.entries, entry))
        entries = [entry if old.name == entry.name else old for old in self.entries]
        return replace(self, entries=tuple(entries))

    def entry(self, name: str) -> Entry | None:
        """Return a run's entry."""
        return next((entry for entry in self.entries if entry.name == name), None)

    def ranked(self) -> list[Entry]:
        """Return the finished runs with an objective, the best first."""
        done = [e for e in self.entries if e.state == "finished" and e.objective is not None]
        sign = -1.0 if self.maximize else 1.0
        return sorted(done, key=lambda e: (sign * (e.objective or 0.0), e.name))

    def write(self, folder: Path) -> None:
        """Replace the file."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, default=str)
        Store(str(folder)).write(LEDGER_FILE, text.encode())


def read_inventory(folder: Path) -> Ledger:
    """Read the ledger of a sweep's folder.

    Raises:
        ConfigError: there is none, or it is of another format.
    """
    path = folder / LEDGER_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}", expected="the folder of a sweep", do="run the sweep first"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}", expected="the ledger of a sweep") from None
    if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
        raise ConfigError(
            f"{path}: another format", expected=f"format {_FORMAT}", do="run the sweep again"
        )
    entries = tuple(Entry(**entry) for entry in data.pop("entries"))
    return Ledger(**{**data, "fields": tuple(data["fields"])}, entries=entries)
