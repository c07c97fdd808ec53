"""From the corpus settings to interpreted rows, in batches, for samples and prompts."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.corpus.chat.conversation import Conversation
from pipeline.corpus.chat.formats import Interpreter, interpreter
from pipeline.corpus.chat.template import TEMPLATE_DATE, ChatTemplate
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources.registry import open_source
from pipeline.corpus.sources.rows import Row, RowSource
from pipeline.corpus.split import HeldoutRule
from pipeline.errors import CorpusError

__all__ = ["Progress", "Reading", "open_reading", "reading_identity", "with_system"]

Progress = Callable[[int, int | None], None]
"""Called with the rows done and, if known beforehand, the number of all rows."""

_BATCH_ROWS = 256
_DETECT_ROWS = 32


@dataclass(frozen=True, slots=True)
class Reading:
    """An opened source: its rows and how each is interpreted."""

    source: RowSource
    format_name: str
    interpret: Interpreter
    batches: Iterator[list[Row]]
    """Can be consumed once."""
    total: int | None
    """The number of rows, or None if only reading tells."""


def open_reading(settings: CorpusSettings, *, answered: bool = True) -> Reading:
    """Open the source and determine its format.

    Args:
        settings: the corpus section of the configuration.
        answered: whether a question without an answer is left out; false where the teacher
            answers it, and then no column of answers is needed.

    Raises:
        CorpusError: the corpus cannot be reached or read, is empty, or fits no format.
    """
    source = open_source(settings)
    total = source.total
    if settings.num_samples is not None and total is not None:
        total = min(total, settings.num_samples)
    rows = itertools.islice(source.rows, settings.num_samples)
    first = list(itertools.islice(rows, _DETECT_ROWS))
    if not first:
        raise CorpusError(
            f"{settings.dataset_name}: holds no rows", expected="at least one row of text or chat"
        )
    format_name, interpret = _interpreter(source, first, settings, answered=answered)
    return Reading(source, format_name, interpret, _batches(itertools.chain(first, rows)), total)


def with_system(item: Conversation, system: str | None) -> Conversation:
    """Put the settings' system message before a conversation that has none."""
    if system is None or item.messages[0]["role"] == "system":
        return item
    first = {"role": "system", "content": system}
    return Conversation([first, *item.messages], item.first_supervised + 1, item.tools)


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(rows, _BATCH_ROWS)):
        yield batch


def _interpreter(
    source: RowSource, first: list[Row], settings: CorpusSettings, *, answered: bool
) -> tuple[str, Interpreter]:
    if not source.mixed:
        return interpreter(first, format=settings.format, column=settings.column, answered=answered)
    readers = {
        name: interpreter([Row("", "", {name: example})])[1]
        for name, example in (("text", "a"), ("messages", [{"role": "user", "content": "a"}]))
    }
    name = "mixed" if settings.format == "auto" else settings.format
    return name, lambda row: readers[next(iter(row.data))](row)


def reading_identity(
    settings: CorpusSettings,
    source: RowSource,
    format_name: str,
    template: ChatTemplate | None,
    rule: HeldoutRule,
    *,
    seed: int,
) -> dict[str, Any]:
    """Describe what determines the rows and their reading; as JSON, equal for equal rows."""
    text = template.text.encode() if template else None
    return {
        "source": source.name,
        "split": settings.dataset_split,
        "content": dict(source.identity),
        "num_samples": settings.num_samples,
        "format": format_name,
        "column": settings.column,
        "chat_template_sha256": hashlib.sha256(text).hexdigest() if text else None,
        "template_date": TEMPLATE_DATE if text else None,
        "template_options": settings.template_options,
        "reasoning": settings.reasoning,
        "invalid_unicode": settings.invalid_unicode,
        "system_prompt": settings.system_prompt,
        "max_length": settings.max_length,
        "overlong": settings.overlong,
        "add_bos": settings.add_bos,
        "heldout": rule.identity(),
        "seed": seed,
    }
