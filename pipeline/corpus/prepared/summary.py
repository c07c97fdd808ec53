"""What is known of a prepared unit without its tokens: counts, held-out candidates, bad rows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from pipeline.config import fingerprint
from pipeline.corpus.bad_rows import BadRows
from pipeline.corpus.sample import CorpusCounts

__all__ = [
    "BlockSummary",
    "CorpusSummary",
    "HashedRow",
    "SampleTotals",
    "UnitReport",
    "UnitSummary",
]


@dataclass(slots=True)
class SampleTotals:
    """Sums over samples."""

    samples: int = 0
    tokens: int = 0
    loss_tokens: int = 0

    def add(self, other: SampleTotals) -> None:
        """Add other samples."""
        self.samples += other.samples
        self.tokens += other.tokens
        self.loss_tokens += other.loss_tokens

    def take(self, other: SampleTotals) -> None:
        """Take samples away."""
        self.samples -= other.samples
        self.tokens -= other.tokens
        self.loss_tokens -= other.loss_tokens


class HashedRow(NamedTuple):
    """A row that may be held out, with the sums over its samples."""

    hash: int
    """The 64 bits that decide about it."""
    row: int
    """Its number within the unit."""
    samples: int
    tokens: int
    loss_tokens: int

    @property
    def totals(self) -> SampleTotals:
        """The sums."""
        return SampleTotals(self.samples, self.tokens, self.loss_tokens)


@dataclass(slots=True)
class BlockSummary:
    """Consecutive samples of a unit that share a file; a unit of ordinary size is one block."""

    first_row: int
    """The rows of a block are those from here to the next block's."""
    train: SampleTotals = field(default_factory=SampleTotals)
    """Of the rows that are no candidates."""
    rows: int = 0
    """With samples: candidates and others."""
    candidates: list[HashedRow] = field(default_factory=list)
    """In the order of the source."""
    smallest: list[HashedRow] = field(default_factory=list)
    """The few others of the smallest hashes, by hash: held out where there are no candidates."""
    checksums: list[str] = field(default_factory=lambda: ["", ""])
    """Of the files of the train rows and of the candidates; empty where there is none."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return self.train.tokens + sum(row.tokens for row in self.candidates)


@dataclass(slots=True)
class UnitReport:
    """How rows became samples; equal for equal rows, whoever read them."""

    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """By the fields of `CorpusCounts`, and of responses that could not be written."""
    documents: int = 0
    given_system: int = 0
    """Chats that had no system message and got the one of the settings."""
    turns: int = 0
    """Supervised turns."""
    unended: int = 0
    """Those that no token which ends generation closes."""
    replaced: int = 0
    """Texts in which U+FFFD took the place of what is not Unicode."""
    notes: dict[str, int] = field(default_factory=dict)
    """What was left out without harm to the text, with the number of rows."""
    content: str = ""
    """Digest of everything that was read and used."""
    bad: BadRows = field(default_factory=BadRows)

    def add(self, other: UnitReport) -> None:
        """Add the report of the unit that follows."""
        for name in ("rows", "documents", "given_system", "turns", "unended", "replaced"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, others in ((self.counts, other.counts), (self.notes, other.notes)):
            for name, count in others.items():
                mine[name] = mine.get(name, 0) + count
        self.content = fingerprint([self.content, other.content]) if self.content else other.content
        self.bad.merge(other.bad)


@dataclass(slots=True)
class UnitSummary:
    """All that planning needs of a unit."""

    index: int
    report: UnitReport
    blocks: list[BlockSummary]

    def to_bytes(self) -> bytes:
        """Return the file's content, on one line, with a checksum over the rest."""
        data = asdict(self)
        data["report"]["bad"] = self.report.bad.to_json()
        data["sha256"] = fingerprint(data)
        return json.dumps(data, separators=(",", ":"), sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> UnitSummary | None:
        """Read the file; None where it is damaged."""
        try:
            data = json.loads(raw)
            stored = data.pop("sha256")
            if fingerprint(data) != stored:
                return None
            report = data["report"]
            report["bad"] = BadRows.from_json(report["bad"])
            blocks = [_block(item) for item in data["blocks"]]
            return cls(int(data["index"]), UnitReport(**report), blocks)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass(slots=True)
class CorpusSummary:
    """What all units of a corpus say together."""

    report: UnitReport
    """Of all units."""
    usable_rows: int
    heldout_rows: int
    moved_rows: int
    """Of these, the ones that only the smallness of the corpus holds out."""
    train: SampleTotals
    heldout: SampleTotals

    def counts(self) -> CorpusCounts:
        """Return the counts of the corpus."""
        names = (
            "truncated_rows", "truncated_tokens", "split_rows", "split_parts",
            "dropped_no_labels", "dropped_overlong",
        )  # fmt: skip
        return CorpusCounts(
            rows=self.report.rows,
            samples=self.train.samples + self.heldout.samples,
            train=self.train.samples,
            heldout=self.heldout.samples,
            tokens=self.train.tokens + self.heldout.tokens,
            loss_tokens=self.train.loss_tokens + self.heldout.loss_tokens,
            quarantined=self.report.bad.count,
            **{name: self.report.counts.get(name, 0) for name in names},
        )


def _block(data: dict[str, Any]) -> BlockSummary:
    data["train"] = SampleTotals(**data["train"])
    for name in ("candidates", "smallest"):
        data[name] = [HashedRow(*item) for item in data[name]]
    return BlockSummary(**data)
