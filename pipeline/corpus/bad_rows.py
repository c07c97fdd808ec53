"""The rows of a corpus that cannot be used: counted by fault, some of them named."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources.rows import BadRow
from pipeline.errors import CorpusError

__all__ = ["BadRowMessage", "BadRows", "are_too_many"]

_log = logging.getLogger(__name__)

_NAMED = 3
"""Rows named for each kind of fault."""
_FEW = 10
"""So many bad rows never stop a run, whatever their share: a small corpus may have a few."""
_REFUSED = 20
"""Bad rows after which a run that refuses them stops; all of them are told at once."""


@dataclass(frozen=True, slots=True)
class BadRowMessage:
    """The three parts of a bad row's message."""

    found: str
    expected: str = ""
    do: str = ""

    def error(self) -> CorpusError:
        """Return it as the error of a run."""
        return CorpusError(self.found, expected=self.expected, do=self.do)


def are_too_many(bad: int, rows: int, settings: CorpusSettings) -> bool:
    """Return whether a run stops for `bad` of `rows` rows."""
    return bad > _FEW and bad > settings.max_quarantined_fraction * rows


@dataclass(slots=True)
class BadRows:
    """The bad rows of one reading, or of several put together."""

    count: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Rows by kind of fault, the first met first."""
    messages: dict[str, list[BadRowMessage]] = field(default_factory=dict)
    """Of the first rows of each kind."""

    def add(self, bad: BadRow, settings: CorpusSettings) -> None:
        """Count one row.

        Raises:
            CorpusError: the run refuses bad rows and has met enough of them to say so.
        """
        self.count += 1
        self.kinds[bad.kind] = self.kinds.get(bad.kind, 0) + 1
        named = self.messages.setdefault(bad.kind, [])
        limit = _REFUSED if settings.on_bad_row == "refuse" else _NAMED
        if len(named) < limit:
            named.append(BadRowMessage(bad.found, bad.expected, bad.do))
        if settings.on_bad_row == "refuse" and self.count >= _REFUSED:
            raise self.refusal(settings, so_far=True)

    def merge(self, other: BadRows) -> None:
        """Add the bad rows of the unit that follows."""
        self.count += other.count
        for kind, count in other.kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + count
            named = self.messages.setdefault(kind, [])
            named += other.messages[kind][: max(0, _NAMED - len(named))]

    def too_many(self, rows: int, settings: CorpusSettings) -> bool:
        """Return whether they are more of `rows` than the run accepts."""
        return are_too_many(self.count, rows, settings)

    def finish(self, rows: int, settings: CorpusSettings) -> None:
        """Report the bad rows among all `rows`.

        Raises:
            CorpusError: there are some and the run refuses them, or there are too many.
        """
        if not self.count:
            return
        if settings.on_bad_row == "refuse":
            raise self.refusal(settings, so_far=False)
        if self.too_many(rows, settings):
            share, most = self.count / rows, settings.max_quarantined_fraction
            raise CorpusError(
                f"{settings.dataset_name}: {self.count} of {rows} rows ({share:.1%}) cannot "
                "be used",
                expected=f"at most {most:.1%} (corpus.max_quarantined_fraction)",
                do="mend the data, or accept the loss with --corpus.max_quarantined_fraction:"
                + self.listed(),
            )
        _log.warning("%d of %d rows are quarantined:%s", self.count, rows, self.listed())

    def listed(self) -> str:
        """Return one line a kind, with its count and the rows that are named."""
        lines = []
        for kind, count in self.kinds.items():
            named = [str(bad.error()) for bad in self.messages[kind]]
            if count > len(named):
                named.append(f"and {count - len(named)} more.")
            lines.append(f"\n  {count} {kind}: " + "\n    ".join(named))
        return "".join(lines)

    def besides(self) -> str:
        """Return what to add to another error's advice: the bad rows may be why."""
        if not self.count:
            return ""
        rows = "row is" if self.count == 1 else "rows are"
        return f"; {self.count} {rows} quarantined:{self.listed()}"

    def refusal(self, settings: CorpusSettings, *, so_far: bool) -> CorpusError:
        """Return the error of a run that refuses them; `so_far`: more rows are to be read."""
        named = [bad for rows in self.messages.values() for bad in rows]
        more = ", and perhaps more" if so_far else ""
        if len(named) == 1:
            return named[0].error()
        return CorpusError(
            f"{settings.dataset_name}: {self.count} rows cannot be used{more}",
            do="mend the data, or leave these rows out with --corpus.on_bad_row quarantine:"
            + self.listed(),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; its order is that of the rows."""
        return {
            "count": self.count,
            "kinds": [
                [kind, count, [asdict(bad) for bad in self.messages[kind]]]
                for kind, count in self.kinds.items()
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BadRows:
        """Read the JSON form."""
        kinds = {kind: count for kind, count, _ in data["kinds"]}
        named = {kind: [BadRowMessage(**bad) for bad in rows] for kind, _, rows in data["kinds"]}
        return cls(int(data["count"]), kinds, named)
