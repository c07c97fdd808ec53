"""The rows of a corpus that cannot be used: counted by fault, some of them named."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources.rows import BadRow
from pipeline.errors import CorpusError

__all__ = ["BadRows"]

_log = logging.getLogger(__name__)

_NAMED = 3
"""Rows named for each kind of fault."""
_FEW = 10
"""So many bad rows never stop a run, whatever their share: a small corpus may have a few."""
_REFUSED = 20
"""Bad rows after which a run that refuses them stops; all of them are told at once."""


@dataclass(slots=True)
class BadRows:
    """Collects the bad rows of one reading."""

    settings: CorpusSettings
    count: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Rows by kind of fault, the first met first."""
    named: dict[str, list[BadRow]] = field(default_factory=dict)

    def add(self, bad: BadRow) -> None:
        """Count one row.

        Raises:
            CorpusError: the run refuses bad rows and has met enough of them to say so.
        """
        self.count += 1
        self.kinds[bad.kind] = self.kinds.get(bad.kind, 0) + 1
        named = self.named.setdefault(bad.kind, [])
        limit = _REFUSED if self.settings.on_bad_row == "refuse" else _NAMED
        if len(named) < limit:
            named.append(bad)
        if self.settings.on_bad_row == "refuse" and self.count >= _REFUSED:
            raise self._refusal(so_far=True)

    def finish(self, rows: int) -> None:
        """Report the bad rows among `rows`.

        Raises:
            CorpusError: there are some and the run refuses them, or there are too many.
        """
        if not self.count:
            return
        if self.settings.on_bad_row == "refuse":
            raise self._refusal(so_far=False)
        share, most = self.count / rows, self.settings.max_quarantined_fraction
        if self.count > _FEW and share > most:
            raise CorpusError(
                f"{self.settings.dataset_name}: {self.count} of {rows} rows ({share:.1%}) cannot "
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
            named = [str(bad) for bad in self.named[kind]]
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

    def _refusal(self, *, so_far: bool) -> CorpusError:
        named = [bad for rows in self.named.values() for bad in rows]
        more = ", and perhaps more" if so_far else ""
        if len(named) == 1:
            bad = named[0]
            return CorpusError(bad.found, expected=bad.expected, do=bad.do)
        return CorpusError(
            f"{self.settings.dataset_name}: {self.count} rows cannot be used{more}",
            do="mend the data, or leave these rows out with --corpus.on_bad_row quarantine:"
            + self.listed(),
        )
