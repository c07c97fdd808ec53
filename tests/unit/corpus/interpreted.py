"""Rows of a file as the corpus reads them, the bad ones included, and packers; for tests."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from pipeline.corpus.chat.conversation import Conversation, Document
from pipeline.corpus.conclusion import log_repairs
from pipeline.corpus.reading import Reading, open_reading
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources.rows import BadRow, Row

__all__ = ["PACKERS", "interpreted", "raw_rows"]

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def interpreted(
    path: Path | str, *, answered: bool = True, **settings: Any
) -> list[Conversation | Document | BadRow]:
    """Return what each row gives."""
    chosen = CorpusSettings(dataset_name=str(path), **settings)
    reading = open_reading(chosen, answered=answered)
    found: list[Conversation | Document | BadRow] = []
    for row in _rows(reading, chosen):
        try:
            found.append(reading.interpret(row))
        except BadRow as bad:
            found.append(bad)
            if not str(bad).startswith(row.place) or not str(bad).encode():
                raise AssertionError(f"{row.place} is not named first: {bad}") from bad
    log_repairs(reading.soundness.replaced, reading.soundness.notes)
    return found


def raw_rows(path: Path | str, **settings: Any) -> list[Row]:
    """Return the rows as their reader gives them."""
    chosen = CorpusSettings(dataset_name=str(path), **settings)
    return list(_rows(open_reading(chosen), chosen))


def _rows(reading: Reading, chosen: CorpusSettings) -> Iterator[Row]:
    for unit in reading.units(chosen):
        for batch in reading.batches(unit):
            yield from batch
