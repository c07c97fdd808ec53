"""The list `tests/mutations.toml`: changed lines of the sources, and the tests that see them."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LIST = ROOT / "tests/mutations.toml"

AREAS = (
    "loss", "cache", "teacher", "data", "student", "corpus", "storage", "sweep", "evaluate",
    "config", "k8s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutation:
    """One changed line: where, from what to what, what breaks, which tests must fail."""

    area: str
    file: str
    old: str
    """Occurs once in the file; may hold lines around the changed one, to be unique."""
    new: str
    breaks: str
    tests: tuple[str, ...]
    """Files, or `file::test`, relative to the root."""

    @property
    def name(self) -> str:
        """Area, file and what breaks, in one line."""
        return f"{self.area:8} {self.file.removeprefix('pipeline/')}: {self.breaks}"

    def changed(self, root: Path) -> str:
        """Return the file's text with the change; `LookupError` unless `old` is there once."""
        text = (root / self.file).read_text(encoding="utf-8")
        found = text.count(self.old)
        if found != 1:
            raise LookupError(f"{self.file} holds {found} times, not once: {self.old!r}")
        return text.replace(self.old, self.new)

    def lines_changed(self) -> int:
        """Return how many lines differ; one that is dropped or trades places counts as one."""
        old, new = self.old.split("\n"), self.new.split("\n")
        while old and new and old[0] == new[0]:
            old, new = old[1:], new[1:]
        while old and new and old[-1] == new[-1]:
            old, new = old[:-1], new[:-1]
        return 1 if sorted(old) == sorted(new) else max(len(old), len(new))

    def digest(self, root: Path) -> str:
        """Return a digest of the change, the file it is made in and the tests that are run."""
        files = [self.file, *sorted({test.partition("::")[0] for test in self.tests})]
        texts = [(root / file).read_text(encoding="utf-8") for file in files]
        whole = json.dumps([self.old, self.new, self.tests, files, texts])
        return hashlib.sha256(whole.encode()).hexdigest()[:24]


def read(file: Path = LIST) -> list[Mutation]:
    """Return the entries in the order of the list; `TypeError` for a key too many or too few."""
    items = tomllib.loads(file.read_text(encoding="utf-8"))["mutation"]
    return [Mutation(**{**item, "tests": tuple(item["tests"])}) for item in items]


def counts(mutations: Sequence[Mutation]) -> Counter[str]:
    """Return how many entries each area has."""
    return Counter(mutation.area for mutation in mutations)
