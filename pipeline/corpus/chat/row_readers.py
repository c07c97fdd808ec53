"""How a row of each format becomes a conversation or a document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.corpus.chat.content import refuse_media
from pipeline.corpus.chat.conversation import (
    Conversation,
    Document,
    Message,
    put_system,
    read_messages,
)
from pipeline.corpus.chat.soundness import Soundness
from pipeline.corpus.chat.tool_calls import read_tools
from pipeline.corpus.sources.rows import BadRow, Row
from pipeline.corpus.sources.unfit import described, kind_of_fault

__all__ = [
    "Interpreter",
    "chat_reader",
    "checked",
    "instruction_reader",
    "prompt_completion_reader",
    "text_reader",
]

Interpreter = Callable[[Row], Conversation | Document]
"""Raises `BadRow` for a row that cannot be used, the one that its reader attached included."""


def checked(read: Interpreter, soundness: Soundness) -> Interpreter:
    """Return the interpreter that also checks what it read."""

    def read_checked(row: Row) -> Conversation | Document:
        if row.bad is not None:
            raise row.bad
        item = read(row)
        if isinstance(item, Conversation):
            item = _completed(item, row, soundness)
        return soundness.checked(item, row.place)

    return read_checked


def chat_reader(column: str, role_key: str, content_key: str) -> Interpreter:
    """Read a list of messages from `column`."""

    def read(row: Row) -> Conversation:
        return read_messages(
            _cell(row, column), place=row.place, role_key=role_key, content_key=content_key
        )

    return read


def prompt_completion_reader(*, answered: bool) -> Interpreter:
    """Read `prompt` and `completion`, each a text or a list of messages.

    Args:
        answered: whether a row without a completion has an empty answer; false: it has none.
    """

    def read(row: Row) -> Conversation:
        prompt = _side(row, "prompt", "user", context=True)
        there = answered or "completion" in row.data
        completion = (
            _side(row, "completion", "assistant", context=False) if there else Conversation([])
        )
        if answered and not completion.messages:
            completion = Conversation([{"role": "assistant", "content": ""}])
        if not prompt.messages and not any(_holds(one) for one in completion.messages):
            return Conversation([])
        begun = _is_begun(prompt) and _holds(prompt.messages[-1])
        if not answered and begun and _may_continue(completion):
            # Who answers goes on where the prompt ends.
            return replace(prompt, first_supervised=len(prompt.messages), unfinished=True)
        if not completion.messages:
            return replace(prompt, first_supervised=len(prompt.messages))
        return _joined(prompt, completion, row)

    return read


def instruction_reader(output: str | None, extra: str | None, *, answered: bool) -> Interpreter:
    """Read `instruction` with its input, and the answer.

    Args:
        output: the column of the answers.
        extra: the column of inputs.
        answered: whether a row without an answer has an empty one; false: it has none.
    """

    def read(row: Row) -> Conversation:
        question = _text_cell(row, "instruction")
        context = _text_cell(row, extra) if extra and extra in row.data else ""
        answer = _text_cell(row, output) if output and (answered or output in row.data) else ""
        asked = "\n\n".join(part for part in (question, context) if part.strip())
        if not asked and not answer.strip():
            return Conversation([])
        messages: list[Message] = [{"role": "user", "content": asked}] if answered or asked else []
        if answered or answer.strip():
            messages.append({"role": "assistant", "content": answer})
        return Conversation(messages)

    return read


def text_reader(column: str) -> Interpreter:
    """Read plain text from `column`."""
    return lambda row: Document(_text_cell(row, column))


def _cell(row: Row, column: str) -> Any:
    if column not in row.data:
        raise BadRow(
            "missing column",
            f"{row.place}: the column {column!r} is missing (found {', '.join(row.data)})",
            expected="the same columns in every row",
        )
    return row.data[column]


def _text_cell(row: Row, column: str) -> str:
    value = _cell(row, column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(
            kind_of_fault(value, "no text"),
            f"{row.place}: the column {column!r} holds {described(value)}",
            expected="text",
        )
    return value


def _side(row: Row, column: str, role: str, *, context: bool) -> Conversation:
    value = _cell(row, column)
    if isinstance(value, str):
        there = value.strip() or (value and not context)
        return Conversation([{"role": role, "content": value}] if there else [])
    return read_messages(
        value,
        place=f"{row.place}, {column}",
        role_key="role",
        content_key="content",
        context=context,
    )


def _holds(message: Message) -> bool:
    return bool(message["content"].strip()) or len(message) > 2


def _is_begun(prompt: Conversation) -> bool:
    """Whether a prompt ends inside an answer; after a call of a tool no text can follow."""
    last = prompt.messages[-1] if prompt.messages else {}
    return last.get("role") == "assistant" and "tool_calls" not in last


def _may_continue(completion: Conversation) -> bool:
    return not completion.messages or completion.messages[0]["role"] == "assistant"


def _joined(prompt: Conversation, completion: Conversation, row: Row) -> Conversation:
    """Put the completion after its prompt, or into the answer with which the prompt ends."""
    first = completion.messages[0]
    continues = _is_begun(prompt) and _may_continue(completion)
    if prompt.unfinished and not continues:
        raise BadRow(
            "a beginning that is not last",
            f"{row.place}: the prompt ends with the beginning of an answer that the completion "
            "does not continue",
            expected="a completion by the assistant",
        )
    head, tail, prefix = prompt.messages, completion.messages, ""
    if continues:
        begun = prompt.messages[-1]
        _require_reasoning_first(begun, first, row)
        prefix = begun["content"]
        head = head[:-1]
        tail = [{**begun, **first, "content": prefix + first["content"]}, *tail[1:]]
    return Conversation(
        [*head, *tail],
        first_supervised=len(head),
        developer=prompt.developer | {n + len(head) for n in completion.developer},
        unsupervised=frozenset(n for n in prompt.unsupervised if n < len(head))
        | {n + len(head) for n in completion.unsupervised},
        unfinished=completion.unfinished,
        answer_prefix=prefix,
    )


def _require_reasoning_first(begun: Message, first: Message, row: Row) -> None:
    """Refuse what cannot be one answer, of which only the completion's text is supervised."""
    thought, said = "reasoning_content" in begun, bool(begun["content"])
    if (thought and not said) or ("reasoning_content" in first and (thought or said)):
        raise BadRow(
            "reasoning after text",
            f"{row.place}: the prompt ends inside an answer, and not all of the completion is "
            "text that follows it",
            expected="an answer whose reasoning stands on one side, with its first words",
        )


def _completed(item: Conversation, row: Row, soundness: Soundness) -> Conversation:
    """Add what stands in columns of its own: the system message and the tools."""
    refuse_media(row.data, row.place)
    if (tools := row.data.get("tools")) is not None:
        item = replace(item, tools=read_tools(tools, row.place))
    system = _text_cell(row, "system") if "system" in row.data else ""
    if not item.messages or not system.strip():
        return item
    if item.messages[0]["role"] != "system":
        return put_system(item, system)
    if item.messages[0]["content"] != system:
        soundness.notes[
            "the chat's own system message is used, not the one in the column 'system'"
        ] += 1
    return item
