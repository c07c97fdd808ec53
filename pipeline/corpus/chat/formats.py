"""The format of a corpus, detected from columns or named, and how its rows are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.corpus.chat.conversation import Conversation, Document, Message, unify_messages
from pipeline.corpus.settings import FormatName
from pipeline.corpus.sources.rows import Row
from pipeline.errors import CorpusError

__all__ = ["Interpreter", "interpreter"]

Interpreter = Callable[[Row], Conversation | Document]

_CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat", "dialogue")
_INSTRUCTION_OUTPUTS = ("output", "response")
_INSTRUCTION_INPUTS = ("input", "context")
_EXPECTED = (
    "sharegpt (conversations: from, value), messages (messages: role, content), "
    "prompt_completion (prompt, completion), instruction (instruction, input, output) or text "
    "(text)"
)
_DO = "name the format in --corpus.format and the column in --corpus.column"


def interpreter(
    first_rows: Sequence[Row],
    *,
    format: FormatName = "auto",
    column: str | None = None,
    answered: bool = True,
) -> tuple[FormatName, Interpreter]:
    """Return the format of the rows and the function that interprets a row.

    Args:
        first_rows: rows whose columns determine the format.
        format: the format, if it is known.
        column: the column of the conversation or text, if it has an unusual name.
        answered: drop a prompt or an instruction without its answer; false keeps it, and the
            column of the answers may be missing.

    Raises:
        CorpusError: the columns of `first_rows` fit no format, or not the named one.
    """
    columns = _columns(first_rows)
    if column is not None and column not in columns:
        raise CorpusError(f"there is no column {column!r}", expected=f"one of {', '.join(columns)}")
    if format == "auto":
        format = _detect(columns, column, answered=answered)
    match format:
        case "sharegpt" | "messages":
            where = column or _first(_CHAT_COLUMNS, columns)
            keys = ("from", "value") if format == "sharegpt" else ("role", "content")
            needed: dict[str, str | None] = {"messages or conversations": where}
            read: Interpreter = _chat_reader(str(where), *keys)
        case "prompt_completion":
            sides = ("prompt", "completion") if answered else ("prompt",)
            needed = {name: _first((name,), columns) for name in sides}
            read = _prompt_completion_reader(answered=answered)
        case "instruction":
            output = _first(_INSTRUCTION_OUTPUTS, columns)
            needed = {"instruction": _first(("instruction",), columns)}
            if answered:
                needed["output"] = output
            read = _instruction_reader(
                output, _first(_INSTRUCTION_INPUTS, columns), answered=answered
            )
        case _:
            where = column or _first(("text",), columns)
            needed = {"text": where}
            read = _text_reader(str(where))
    missing = [name for name, found in needed.items() if found is None]
    if missing:
        raise CorpusError(
            f"the format {format} lacks the column {' and '.join(missing)} "
            f"(the columns are {', '.join(columns)})",
            expected=_EXPECTED,
            do=_DO,
        )
    return format, read


def _columns(rows: Sequence[Row]) -> dict[str, Any]:
    """Return every column with its first value that is not empty."""
    columns: dict[str, Any] = {}
    for row in rows:
        for name, value in row.data.items():
            if columns.get(name) in (None, "", []):
                columns[name] = value
    return columns


def _first(names: Sequence[str], columns: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in columns), None)


def _detect(columns: Mapping[str, Any], column: str | None, *, answered: bool) -> FormatName:
    candidates = [column] if column else [name for name in _CHAT_COLUMNS if name in columns]
    for name in candidates:
        value = columns[name]
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            if {"role", "content"} <= value[0].keys():
                return "messages"
            if {"from", "value"} <= value[0].keys():
                return "sharegpt"
    if column is not None and isinstance(columns[column], str):
        return "text"
    if column is None:
        if "prompt" in columns and ("completion" in columns or not answered):
            return "prompt_completion"
        if "instruction" in columns and (_first(_INSTRUCTION_OUTPUTS, columns) or not answered):
            return "instruction"
        if isinstance(columns.get("text"), str):
            return "text"
    found = ", ".join(f"{name} ({_describe(value)})" for name, value in columns.items())
    raise CorpusError(
        f"the columns fit no known format: {found or 'there are none'}", expected=_EXPECTED, do=_DO
    )


def _describe(value: object) -> str:
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        return f"list of {{{', '.join(map(str, value[0]))}}}"
    return "empty" if value is None else type(value).__name__


def _cell(row: Row, column: str) -> Any:
    if column not in row.data:
        raise CorpusError(
            f"{row.place}: the column {column!r} is missing (found {', '.join(row.data)})",
            expected="the same columns in every row",
        )
    return row.data[column]


def _text_cell(row: Row, column: str) -> str:
    value = _cell(row, column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(
            f"{row.place}: the column {column!r} holds {type(value).__name__}", expected="text"
        )
    return value


def _chat_reader(column: str, role_key: str, content_key: str) -> Interpreter:
    def read(row: Row) -> Conversation:
        cell = _cell(row, column)
        messages = unify_messages(cell, place=row.place, role_key=role_key, content_key=content_key)
        return Conversation(_with_system_column(messages, row), tools=_tools(row))

    return read


def _prompt_completion_reader(*, answered: bool) -> Interpreter:
    def read(row: Row) -> Conversation:
        prompt = _side(row, "prompt", "user")
        there = answered or "completion" in row.data
        completion = _side(row, "completion", "assistant") if there else []
        if answered and not completion:
            return Conversation([])
        return Conversation([*prompt, *completion], first_supervised=len(prompt), tools=_tools(row))

    return read


def _side(row: Row, column: str, role: str) -> list[Message]:
    value = _cell(row, column)
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value.strip() else []
    return unify_messages(
        value, place=f"{row.place}, {column}", role_key="role", content_key="content"
    )


def _instruction_reader(output: str | None, extra: str | None, *, answered: bool) -> Interpreter:
    def read(row: Row) -> Conversation:
        question = _text_cell(row, "instruction")
        context = _text_cell(row, extra) if extra and extra in row.data else ""
        answer = _text_cell(row, output) if output and (answered or output in row.data) else ""
        asked = "\n\n".join(part for part in (question, context) if part.strip())
        messages = [{"role": "user", "content": asked}] if answered or asked else []
        if answer.strip():
            messages.append({"role": "assistant", "content": answer})
        elif answered:
            return Conversation([])
        return Conversation(_with_system_column(messages, row))

    return read


def _text_reader(column: str) -> Interpreter:
    return lambda row: Document(_text_cell(row, column))


def _with_system_column(messages: list[Message], row: Row) -> list[Message]:
    system = row.data.get("system")
    if not messages or not isinstance(system, str) or not system.strip():
        return messages
    if messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _tools(row: Row) -> list[Any] | None:
    tools = row.data.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise CorpusError(
                f"{row.place}: the column 'tools' is not JSON ({error.msg})", expected="a JSON list"
            ) from None
    return list(tools) if isinstance(tools, (list, tuple)) and tools else None
