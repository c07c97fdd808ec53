"""The format of a corpus, detected from columns or named, and how its rows are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.nearest import did_you_mean
from pipeline.corpus.chat.row_readers import (
    Interpreter,
    chat_reader,
    checked,
    instruction_reader,
    prompt_completion_reader,
    text_reader,
)
from pipeline.corpus.chat.soundness import Soundness
from pipeline.corpus.chat.tool_calls import listed
from pipeline.corpus.settings import FormatName
from pipeline.corpus.sources.rows import BadRow, Row
from pipeline.corpus.sources.unfit import described
from pipeline.errors import CorpusError

__all__ = ["Interpreter", "RowFormat", "row_format"]

_CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat", "dialogue")
_CHAT_KEYS: dict[FormatName, tuple[str, str]] = {
    "messages": ("role", "content"),
    "sharegpt": ("from", "value"),
}
_INSTRUCTION_OUTPUTS = ("output", "response")
_INSTRUCTION_INPUTS = ("input", "context")
_BESIDE_A_CHAT = ("system", "tools")
_EXPECTED = (
    "sharegpt (conversations: from, value), messages (messages: role, content), "
    "prompt_completion (prompt, completion), instruction (instruction, input, output) or text "
    "(text)"
)
_DO = "name the format in --corpus.format and the column in --corpus.column"


@dataclass(frozen=True, slots=True)
class RowFormat:
    """The format of a source's rows."""

    name: FormatName
    interpret: Interpreter
    used: tuple[str, ...]
    """The columns that are read, of those in the first rows."""
    unused: tuple[str, ...]
    """The others."""
    column: str | None
    """Of the conversation or the text, where one column holds it."""
    why: str
    """What decided it, in words."""


def row_format(
    first_rows: Sequence[Row],
    *,
    format: FormatName = "auto",
    column: str | None = None,
    answered: bool = True,
    soundness: Soundness | None = None,
) -> RowFormat:
    """Return the format of the rows and the function that interprets a row.

    Args:
        first_rows: rows whose columns determine the format; bad ones are skipped.
        format: the format, if it is known.
        column: the column of the conversation or text, if it has an unusual name.
        answered: whether a prompt or an instruction without its answer has an empty one; false:
            it has none, and the column of the answers may be missing.
        soundness: checks and counts what is read.

    Raises:
        CorpusError: the columns of `first_rows` fit no format, or not the named one; or `column`
            is given for a format whose columns are fixed.
    """
    columns = _columns(first_rows)
    if column is not None and column not in columns:
        raise CorpusError(
            f"there is no column {column!r}",
            expected=f"one of {_joined(columns)}",
            do=did_you_mean(column, columns),
        )
    where, named = column, format != "auto"
    if format == "auto":
        format, where = _detect(columns, column, answered=answered)
    elif column is None and format in _CHAT_KEYS:
        where = _chat_column(columns, format) or _first(_CHAT_COLUMNS, columns)
    if column is not None and format in ("prompt_completion", "instruction"):
        raise CorpusError(
            f"the column {column!r} is named, but the format {format} has columns of its own",
            expected=_EXPECTED,
            do="leave out --corpus.column, or name another format in --corpus.format",
        )
    match format:
        case "sharegpt" | "messages":
            needed: dict[str, str | None] = {"messages or conversations": where}
            read: Interpreter = chat_reader(str(where), *_CHAT_KEYS[format])
            used: list[str | None] = [where, *_BESIDE_A_CHAT]
        case "prompt_completion":
            sides = ("prompt", "completion") if answered else ("prompt",)
            needed = {name: _first((name,), columns) for name in sides}
            read = prompt_completion_reader(answered=answered)
            used = ["prompt", "completion", *_BESIDE_A_CHAT]
        case "instruction":
            output = _first(_INSTRUCTION_OUTPUTS, columns)
            extra = _first(_INSTRUCTION_INPUTS, columns)
            needed = {"instruction": _first(("instruction",), columns)}
            if answered:
                needed["output"] = output
            read = instruction_reader(output, extra, answered=answered)
            used = ["instruction", extra, output, *_BESIDE_A_CHAT]
        case _:
            where = where or _first(("text",), columns)
            needed = {"text": where}
            read = text_reader(str(where))
            used = [where]
    missing = [name for name, found in needed.items() if found is None]
    if missing:
        raise CorpusError(
            f"the format {format} lacks the column {' and '.join(missing)} "
            f"(the columns are {_joined(columns)})",
            expected=_EXPECTED,
            do=_DO,
        )
    return RowFormat(
        format,
        checked(read, soundness or Soundness()),
        tuple(name for name in columns if name in used),
        tuple(name for name in columns if name not in used),
        where,
        _why(format, where, named=named),
    )


def _why(format: FormatName, where: str | None, *, named: bool) -> str:
    if named:
        return "named by --corpus.format"
    match format:
        case "sharegpt" | "messages":
            return f"the column {where} holds lists of {{{_joined(_CHAT_KEYS[format])}}}"
        case "text":
            return f"the column {where} holds text"
        case "prompt_completion":
            return "there are columns prompt and completion"
        case _:
            return "there is a column instruction, with one of answers"


def _columns(rows: Sequence[Row]) -> dict[str, Any]:
    """Return every column with its first value that can be used, or else the first not empty."""
    columns: dict[str, Any] = {}
    for row in rows:
        for name, value in row.data.items():
            held = columns.get(name)
            if held is None or _is_empty(held) or (_is_odd(name, held) and not _is_empty(value)):
                columns[name] = value
    return columns


def _is_odd(name: str, value: Any) -> bool:
    """Whether a value says nothing of its column's format: its row may be the only such one."""
    if isinstance(value, str) and name not in _CHAT_COLUMNS:
        return False
    return not any(_is_chat(value, format) for format in _CHAT_KEYS)


def _is_empty(value: Any) -> bool:
    if isinstance(value, Mapping):  # of lists: a table's list of objects
        return not any(value.values())
    if isinstance(value, str):
        return value.strip() in ("", "[]", "null")
    return value in (None, [])


def _as_chat(value: Any) -> Any:
    """Return a list of messages where the value is one in another shape."""
    if isinstance(value, Mapping) or (isinstance(value, str) and value.lstrip()[:1] in ("[", "{")):
        try:
            return listed(value, "", "")
        except BadRow:
            return value
    return value


def _first(names: Sequence[str], columns: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in columns), None)


def _chat_column(columns: Mapping[str, Any], format: FormatName) -> str | None:
    fitting = (name for name in _CHAT_COLUMNS if _is_chat(columns.get(name), format))
    return next(fitting, None)


def _is_chat(value: object, format: FormatName) -> bool:
    items = _as_chat(value)
    # Any of the messages: a call of a tool may have no content.
    return isinstance(items, (list, tuple)) and any(
        isinstance(item, Mapping) and set(_CHAT_KEYS[format]) <= item.keys() for item in items
    )


def _detect(
    columns: Mapping[str, Any], column: str | None, *, answered: bool
) -> tuple[FormatName, str | None]:
    candidates = [column] if column else [name for name in _CHAT_COLUMNS if name in columns]
    for name in candidates:
        for format in _CHAT_KEYS:
            if _is_chat(columns[name], format):
                return format, name
    if column is not None and isinstance(columns[column], str):
        return "text", column
    if column is None:
        if "prompt" in columns and ("completion" in columns or not answered):
            return "prompt_completion", None
        if "instruction" in columns and (_first(_INSTRUCTION_OUTPUTS, columns) or not answered):
            return "instruction", None
        if isinstance(columns.get("text"), str):
            return "text", "text"
    found = ", ".join(f"{_joined([name])} ({_shape(value)})" for name, value in columns.items())
    raise CorpusError(
        f"the columns fit no known format: {found or 'there are none'}", expected=_EXPECTED, do=_DO
    )


def _shape(value: object) -> str:
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        return f"list of {{{_joined(value[0])}}}"
    return "empty" if value is None else described(value)


def _joined(names: Any) -> str:
    # A name in JSON may be no valid Unicode; a message is.
    return ", ".join(map(str, names)).encode("utf-8", "backslashreplace").decode()
