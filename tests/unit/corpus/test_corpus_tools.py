"""Calls of tools, reasoning and content parts: one shape, or the row is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.corpus.chat.conversation import Conversation
from pipeline.corpus.sources.rows import BadRow
from tests.unit.corpus.interpreted import interpreted

Write = Callable[..., Path]

ASKED = {"role": "user", "content": "q"}


@pytest.fixture
def message(write_jsonl: Write) -> Callable[..., dict[str, Any]]:
    """Return a reader of one message, after a question."""

    def read(**keys: Any) -> dict[str, Any]:
        row = {"messages": [ASKED, {"role": "assistant", "content": "x", **keys}]}
        (found,) = interpreted(write_jsonl([row]))
        if isinstance(found, BadRow):
            raise found
        assert isinstance(found, Conversation)
        return found.messages[1]

    return read


def _call(arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", **more, "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"tool_calls": [_call({"a": 1}, id="c")]}, _call({"a": 1}, id="c")),
        ({"tool_calls": [{"name": "f", "arguments": {"a": 1}}]}, _call({"a": 1})),
        ({"tool_calls": [{"name": "f", "arguments": '{"a": "é"}'}]}, _call({"a": "é"})),
        ({"tool_calls": [{"name": "f", "parameters": {"a": 1}}]}, _call({"a": 1})),
        ({"tool_calls": [{"name": "f", "arguments": " "}]}, _call({})),
        ({"tool_calls": [{"name": "f", "arguments": None, "id": None}]}, _call({})),
        ({"tool_calls": [{"name": "f"}]}, _call({})),
        ({"tool_calls": [{"name": "f", "index": 0, "id": "c"}]}, _call({}, index=0, id="c")),
        ({"tool_calls": json.dumps([_call({"a": None})])}, _call({"a": None})),
        ({"tool_calls": [json.dumps(_call({}))]}, _call({})),
        ({"tool_calls": {"name": ["f"], "arguments": ['{"a": 1}']}}, _call({"a": 1})),
        ({"function_call": {"name": "f", "arguments": '{"a": 1}'}}, _call({"a": 1})),
        ({"function_call": '{"name": "f", "arguments": "{}"}', "tool_calls": []}, _call({})),
    ],
)
def test_a_call_has_one_shape(
    keys: dict[str, Any], wanted: dict[str, Any], message: Callable[..., dict[str, Any]]
) -> None:
    found = message(**keys)
    assert found == {"role": "assistant", "content": "x", "tool_calls": [wanted]}


@pytest.mark.parametrize("nothing", [[], None, "", "[]", "null", {}])
@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_no_calls_are_no_key(key: str, nothing: Any, message: Callable[..., Any]) -> None:
    assert message(**{key: nothing}) == {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("keys", "kind", "words"),
    [
        ({"tool_calls": [{"arguments": {}}]}, "a tool call without a name", "'arguments'"),
        ({"tool_calls": [{"name": " "}]}, "a tool call without a name", ""),
        (
            {"tool_calls": [{"name": "f", "arguments": "a=1"}]},
            "tool arguments are not JSON",
            "of f",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": "[1]"}]},
            "tool arguments are not JSON",
            "list",
        ),
        ({"tool_calls": [{"name": "f", "arguments": [1]}]}, "tool arguments are not JSON", "list"),
        (
            {"tool_calls": [{"name": "f", "arguments": '"{}"'}]},
            "tool arguments are not JSON",
            "str",
        ),
        ({"tool_calls": "f()"}, "not JSON", "'tool_calls' is not JSON"),
        ({"tool_calls": ["f()"]}, "not JSON", "a tool call is text that is not JSON"),
        ({"tool_calls": [3]}, "no object", "a tool call is int"),
        ({"tool_calls": [{"type": "custom", "name": "f"}]}, "an unknown tool call", "'custom'"),
        (
            {"tool_calls": [_call({})], "function_call": {"name": "f"}},
            "two sets of tool calls",
            "both",
        ),
        ({"reasoning": ["a"]}, "no text", "'reasoning' is list"),
        ({"reasoning": "a", "thinking": "b"}, "contradicting reasoning", "differs"),
        ({"content": {"a": 1}}, "no text", "the content is dict"),
        ({"content": 5}, "no text", "the content is int"),
        ({"content": [{"type": "text"}]}, "no text", "of type 'text'"),
        ({"content": [{"type": "refusal", "refusal": "no", "text": "t"}]}, "no text", "'refusal'"),
        ({"content": [{"type": "image_url", "text": "t"}]}, "no text", "'image_url'"),
        ({"content": [{"type": "text", "text": "t", "image_url": "u"}]}, "no text", "'image_url'"),
        ({"content": [{"text": "t", "audio": "u"}]}, "no text", "carries 'audio'"),
        ({"images": ["u"]}, "no text", "has 'images'"),
        ({"content": [{"type": "thinking"}]}, "no text", "without its text"),
        (
            {"content": ["said", {"type": "thinking", "thinking": "late"}]},
            "reasoning after text",
            "follows",
        ),
        ({"content": None, "value": "text"}, "no text", "no 'content', but 'value'"),
        ({"content": None, "refusal": "No."}, "no text", "no 'content', but 'refusal'"),
    ],
)
def test_what_is_no_message_is_named(
    keys: dict[str, Any], kind: str, words: str, message: Callable[..., Any]
) -> None:
    with pytest.raises(BadRow) as caught:
        message(**keys)
    assert caught.value.kind == kind
    assert str(caught.value).startswith("data.jsonl, line 1, message 2")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"reasoning_content": "why"},
        {"reasoning": "why"},
        {"thinking": "why", "reasoning": "", "reasoning_content": None},
        {"reasoning": "why", "reasoning_content": "why"},
        {"content": [{"type": "thinking", "thinking": "why", "signature": "s"}, "x"]},
        {"content": [{"type": "reasoning", "text": "why"}, {"type": "output_text", "text": "x"}]},
        {
            "content": [
                {"type": "reasoning", "reasoning": "w"},
                {"type": "thinking", "text": "hy"},
                "x",
            ]
        },
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "why"}]}, "x"]},
    ],
)
def test_reasoning_has_one_key(keys: dict[str, Any], message: Callable[..., Any]) -> None:
    assert message(**keys) == {"role": "assistant", "content": "x", "reasoning_content": "why"}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_empty_reasoning_is_no_key(key: str, message: Callable[..., Any]) -> None:
    assert message(**{key: ""}) == {"role": "assistant", "content": "x"}


def test_parts_of_text_are_joined(message: Callable[..., Any]) -> None:
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "input_text", "text": "b"}, "c"]
    assert message(content=parts)["content"] == "abc"
    assert message(content=[])["content"] == ""


def test_a_result_that_is_an_object_is_its_json(write_jsonl: Write) -> None:
    results: list[Any] = [{"grad": "20 °C", "n": None}, "plain", None, [1], {"n": float("nan")}]
    rows = [{"messages": [ASKED, {"role": "tool", "content": result}]} for result in results]
    found = interpreted(write_jsonl(rows))
    texts = [item.messages[1]["content"] for item in found if isinstance(item, Conversation)]
    assert texts == ['{"grad": "20 °C", "n": null}', "plain", ""]
    assert [item.kind for item in found if isinstance(item, BadRow)] == ["no text", "not JSON data"]


def test_images_beside_a_chat_are_refused(write_jsonl: Write) -> None:
    pairs: list[dict[str, Any]] = [
        {"messages": [ASKED]},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "output": "a"},
    ]
    for number, pair in enumerate(pairs):
        for name in ("image", "images", "videos", "audio"):
            rows = [{**pair, name: value} for value in (None, [], "", "data")]
            *good, bad = interpreted(write_jsonl(rows, f"{number}.jsonl"))
            assert all(isinstance(item, Conversation) for item in good)
            assert isinstance(bad, BadRow)
            assert f"line 4: has {name!r}" in str(bad)


@pytest.mark.parametrize("beside", ["messages", "prompt", "instruction"])
def test_tools_and_the_system_message_come_with_every_format(
    beside: str, write_jsonl: Write
) -> None:
    answer = {"role": "assistant", "content": "a"}
    chat: dict[str, Any] = {
        "messages": {"messages": [ASKED, answer]},
        "prompt": {"prompt": "q", "completion": "a"},
        "instruction": {"instruction": "q", "output": "a"},
    }[beside]
    tool = {"name": "f", "parameters": {"default": None}}
    rows = [
        {**chat, "system": "Be kind.", "tools": tools}
        for tools in ([tool], json.dumps([tool]), [json.dumps(tool)], None, "", "null", [], "{", 5)
    ]
    rows.append({**chat, "system": 5, "tools": None})
    found = interpreted(write_jsonl(rows))
    good = [item for item in found if isinstance(item, Conversation)]
    assert [item.tools for item in good] == [[tool]] * 3 + [None] * 4
    system = {"role": "system", "content": "Be kind."}
    assert all(item.messages == [system, ASKED, answer] for item in good)
    assert {item.first_supervised for item in good} == {2 if beside == "prompt" else 1}
    bad = [str(item) for item in found if isinstance(item, BadRow)]
    assert len(bad) == 3
    assert "line 8: the column 'tools' is not JSON" in bad[0]
    assert "line 9: the column 'tools' holds int" in bad[1]
    assert "line 10: the column 'system' holds int" in bad[2]


def test_a_system_column_that_is_not_used_is_said(
    write_jsonl: Write, caplog: pytest.LogCaptureFixture
) -> None:
    own = [{"role": "system", "content": "Own."}, ASKED]
    rows = [{"messages": own, "system": text} for text in ("Own.", "Other.", "Third.")]
    assert interpreted(write_jsonl(rows)) == [Conversation(own, first_supervised=0)] * 3
    assert "2 rows: the chat's own system message is used" in caplog.text
