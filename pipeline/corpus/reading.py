"""From the corpus settings to interpreted rows, in batches, for samples and prompts."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.corpus.chat.conversation import Conversation, put_system
from pipeline.corpus.chat.formats import Interpreter, RowFormat, row_format
from pipeline.corpus.chat.rendering.template import TEMPLATE_DATE, ChatTemplate
from pipeline.corpus.chat.soundness import Soundness
from pipeline.corpus.prepared.units import Unit, cut_units, rows_of
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources.registry import open_source
from pipeline.corpus.sources.rows import Row, RowSource
from pipeline.corpus.split import HeldoutRule
from pipeline.errors import CorpusError

__all__ = ["Reading", "open_reading", "reading_identity", "with_system"]

_log = logging.getLogger(__name__)

_BATCH_ROWS = 256
_DETECT_ROWS = 32
_UNDIVIDED = 1 << 62


@dataclass(frozen=True, slots=True)
class Reading:
    """An opened source and how its rows are interpreted."""

    source: RowSource
    format_name: str
    interpret: Interpreter
    soundness: Soundness
    """What `interpret` repairs, and counts."""
    format: RowFormat | None = None
    """Which columns are read, and why; None where every row is read by its own columns."""

    def units(self, settings: CorpusSettings) -> tuple[Unit, ...]:
        """Cut the source.

        Raises:
            CorpusError: a file cannot be read.
        """
        return cut_units(
            self.source,
            unit_bytes=max(1, round(settings.unit_mib * (1 << 20))),
            num_samples=settings.num_samples,
        )

    def batches(self, unit: Unit) -> Iterator[list[Row]]:
        """Yield the rows of a unit, a few hundred at a time.

        Raises:
            CorpusError: the source cannot be read.
        """
        rows = rows_of(self.source, unit)
        while batch := list(itertools.islice(rows, _BATCH_ROWS)):
            yield batch


def open_reading(
    settings: CorpusSettings,
    *,
    answered: bool = True,
    source: RowSource | None = None,
    few: bool = False,
) -> Reading:
    """Open the source and determine its format.

    Args:
        settings: the corpus section of the configuration.
        source: the source, where it has been opened before.
        answered: whether a question without an answer has an empty one; false where the teacher
            answers it, and then no column of answers is needed.
        few: only the first rows are wanted, as `open_source` says.

    Raises:
        CorpusError: the corpus cannot be reached or read, is empty, fits no format, or cannot
            honour a setting.
    """
    source = open_source(settings, few=few) if source is None else source
    first_rows = min(_DETECT_ROWS, settings.num_samples or _DETECT_ROWS)
    rows = (row for piece in source.pieces(_UNDIVIDED) for row in source.read(piece))
    first = list(itertools.islice(rows, first_rows))
    if not first:
        raise CorpusError(
            f"{settings.dataset_name}: holds no rows", expected="at least one row of text or chat"
        )
    _require_a_good_row(first)
    soundness = Soundness(replace=settings.invalid_unicode == "replace")
    found = _interpreter(source, first, settings, soundness, answered=answered)
    format_name, interpret, columns = found
    _check_settings(settings, format_name)
    return Reading(source, format_name, interpret, soundness, columns)


def with_system(item: Conversation, system: str | None) -> Conversation:
    """Put the settings' system message before a conversation that has none."""
    if system is None or (item.messages and item.messages[0]["role"] == "system"):
        return item
    return put_system(item, system)


def _require_a_good_row(first: list[Row]) -> None:
    bad = first[0].bad
    if bad is not None and all(row.bad is not None for row in first):
        raise CorpusError(bad.found, expected=bad.expected, do=bad.do)


def _interpreter(
    source: RowSource,
    first: list[Row],
    settings: CorpusSettings,
    soundness: Soundness,
    *,
    answered: bool,
) -> tuple[str, Interpreter, RowFormat | None]:
    chosen, column = settings.format, settings.column
    if not source.mixed:
        found = row_format(
            [row for row in first if row.bad is None],
            format=chosen,
            column=column,
            answered=answered,
            soundness=soundness,
        )
        _report_columns(settings, found)
        return found.name, found.interpret, found
    readers = {
        name: row_format([Row("", "", {name: example})], soundness=soundness).interpret
        for name, example in (("text", "a"), ("messages", [{"role": "user", "content": "a"}]))
    }
    name = "mixed" if chosen == "auto" else chosen
    return name, lambda row: readers[next(iter(row.data))](row), None


def _report_columns(settings: CorpusSettings, found: RowFormat) -> None:
    used, unused = (", ".join(names) or "none" for names in (found.used, found.unused))
    text = f"{settings.dataset_name}: format {found.name}; columns read: {used}; not read: {unused}"
    _log.info("%s", text.encode("utf-8", "backslashreplace").decode())


def _check_settings(settings: CorpusSettings, format_name: str) -> None:
    """Refuse settings of chats where the text is plain; name others that have no effect.

    Raises:
        CorpusError: as said.
    """
    if settings.on_bad_row == "refuse" and _is_chosen(settings, "max_quarantined_fraction"):
        _log.warning(
            "%s: --corpus.max_quarantined_fraction has no effect with on_bad_row refuse",
            settings.dataset_name,
        )
    if settings.loss_on == "all" and settings.supervise_empty and format_name != "text":
        _log.warning(
            "%s: --corpus.supervise_empty has no effect with loss_on all", settings.dataset_name
        )
    if format_name == "text":
        for name in ("system_prompt", "chat_template", "template_options"):
            if getattr(settings, name):
                raise CorpusError(
                    f"{settings.dataset_name}: is plain text, and {name} is for chats",
                    do=f"leave out {name}, or name the format of the chats in --corpus.format",
                )
        idle: tuple[str, ...] = ("loss_on", "reasoning", "supervise_empty")
    elif format_name == "mixed":
        return
    else:
        idle = ("add_bos", "add_eos")
    for name in idle:
        if _is_chosen(settings, name):
            value = getattr(settings, name)
            kind = "plain text" if format_name == "text" else "chats"
            _log.warning(
                "%s: --corpus.%s %s has no effect on %s", settings.dataset_name, name, value, kind
            )


def _is_chosen(settings: CorpusSettings, name: str) -> bool:
    return bool(getattr(settings, name) != CorpusSettings.model_fields[name].default)


def reading_identity(
    settings: CorpusSettings,
    reading: Reading,
    template: ChatTemplate | None,
    rule: HeldoutRule,
    *,
    seed: int,
) -> dict[str, Any]:
    """Describe what determines the rows and their reading; as JSON, equal for equal rows."""
    text = template.text.encode() if template else None
    return {
        "source": reading.source.name,
        "split": settings.dataset_split,
        "content": dict(reading.source.identity),
        "num_samples": settings.num_samples,
        "format": reading.format_name,
        "column": settings.column,
        "chat_template_sha256": hashlib.sha256(text).hexdigest() if text else None,
        "template_date": TEMPLATE_DATE if text else None,
        "template_options": settings.template_options,
        "reasoning": settings.reasoning,
        "invalid_unicode": settings.invalid_unicode,
        "system_prompt": settings.system_prompt,
        "max_length": settings.longest,
        "unit_mib": settings.unit_mib,
        "overlong": settings.overlong,
        "add_bos": settings.add_bos,
        "heldout": rule.identity(),
        "seed": seed,
    }
