"""Steps of a run that are done and untouched since: the same command passes over them at once.

Each stage finds out by itself that nothing is left to do, but loads its libraries for that: 71 s
for the four of the default run. Here a step is passed over where its command, its configuration,
the program, the steps before it and every file that it left are as they were; `make` does the same
with its targets.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import fingerprint
from pipeline.program import packaged_file

__all__ = ["Step", "Steps"]

_FILE = "steps.json"
_PROGRAM = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Step:
    """One step: what does it, what it reads beside the steps before it, and what it writes."""

    name: str
    command: Sequence[str]
    output: Path
    """A folder."""
    config: str = ""
    """A file; empty: none."""


@dataclass
class Steps:
    """The finished steps below one folder, in the order in which they are asked for."""

    folder: Path
    _before: str = ""
    """Digest of the steps so far; a step that is done again makes all later ones stale."""
    _known: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what earlier calls recorded; a file that cannot be read records nothing."""
        try:
            data = json.loads((self.folder / _FILE).read_text(encoding="utf-8"))
            self._known = {str(name): str(digest) for name, digest in data.items()}
        except (OSError, ValueError, AttributeError):
            self._known = {}
        self._before = _program()

    def is_done(self, step: Step) -> bool:
        """Return whether a step was recorded and nothing about it has changed."""
        digest = self._digest(step)
        done = digest is not None and self._known.get(step.name) == digest
        if done:
            self._before = digest or ""
        return done

    def record(self, step: Step) -> None:
        """Note that a step has been done."""
        digest = self._digest(step)
        if digest is None:
            return
        self._before = self._known[step.name] = digest
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{_FILE}.partial"
        partial.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
        partial.replace(self.folder / _FILE)

    def _digest(self, step: Step) -> str | None:
        """Return a digest of all that decides the step and that it left; None where that lacks."""
        if not step.output.is_dir():
            return None
        try:
            read = packaged_file(step.config).read_text(encoding="utf-8") if step.config else ""
        except (OSError, UnicodeDecodeError):
            return None
        left = sorted(_files(step.output))
        return fingerprint([self._before, list(step.command), read, left])


def _program() -> str:
    """Return a digest of the program's sources, by size and time."""
    parts = [sorted(_files(_PROGRAM / part, ending=".py")) for part in ("pipeline", "stages")]
    return fingerprint(parts)


def _files(folder: Path, *, ending: str = "") -> Iterator[list[str | int]]:
    """Yield name, size and time of every file below a folder."""
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith(ending):
                path = os.path.join(place, name)
                facts = os.stat(path)
                yield [os.path.relpath(path, folder), facts.st_size, facts.st_mtime_ns]
