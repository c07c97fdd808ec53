"""What the corpus hands on: all samples, their counts and the identity of them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.corpus.sample import CorpusCounts
from pipeline.corpus.table import SampleTable

__all__ = ["Corpus"]


@dataclass(frozen=True, slots=True)
class Corpus:
    """All samples of a corpus in source order."""

    samples: SampleTable
    """On the scratch disk, not in memory."""
    counts: CorpusCounts
    identity: dict[str, Any]
    """JSON-able, and known before a row is read; the tokenizer is the caller's to add."""
    content: str = ""
    """Digest of everything that was read and used; with the identity, equal for equal samples."""
