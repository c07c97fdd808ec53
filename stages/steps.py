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

__all__ = ["Steps"]

_FILE = "steps.json"
_PROGRAM = Path(__file__).resolve().parents[1]


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

    def is_done(
        self, name: str, command: Sequence[str], *, configs: Sequence[str], outputs: Sequence[Path]
    ) -> bool:
        """Return whether a step was recorded and nothing about it has changed.

        Args:
            name: of the step.
            command: that does it.
            configs: files that the command reads.
            outputs: folders that it writes.
        """
        digest = self._digest(command, configs, outputs)
        done = digest is not None and self._known.get(name) == digest
        if done:
            self._before = digest or ""
        return done

    def record(
        self, name: str, command: Sequence[str], *, configs: Sequence[str], outputs: Sequence[Path]
    ) -> None:
        """Note that a step has been done; the arguments are those of `is_done`."""
        digest = self._digest(command, configs, outputs)
        if digest is None:
            return
        self._before = self._known[name] = digest
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{_FILE}.partial"
        partial.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
        partial.replace(self.folder / _FILE)

    def _digest(
        self, command: Sequence[str], configs: Sequence[str], outputs: Sequence[Path]
    ) -> str | None:
        """Return a digest of all that decides the step and that it left; None where that lacks."""
        if not all(folder.is_dir() for folder in outputs):
            return None
        try:
            read = [packaged_file(config).read_text(encoding="utf-8") for config in configs]
        except (OSError, UnicodeDecodeError):
            return None
        left = [sorted(_files(folder)) for folder in outputs]
        return fingerprint([self._before, list(command), read, left])


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
