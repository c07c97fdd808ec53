"""What the data says of single turns, answers that are empty or begun, and text that is no text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.corpus.chat.conversation import Conversation, Document
from pipeline.corpus.reading import with_system
from pipeline.corpus.sources.rows import BadRow
from tests.unit.corpus.interpreted import interpreted

Write = Callable[..., Path]


def _user(content: str = "q", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def _answer(content: str | None = "a", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.fixture
def one(write_jsonl: Write) -> Callable[..., Conversation]:
    """Return a reader of one row, given as columns or as messages."""

    def read(*messages: dict[str, Any], answered: bool = True, **columns: Any) -> Conversation:
        row = columns or {"messages": list(messages)}
        (found,) = interpreted(write_jsonl([row]), answered=answered)
        if isinstance(found, BadRow):
            raise found
        assert isinstance(found, Conversation)
        return found

    return read


One = Callable[..., Conversation]


@pytest.mark.parametrize(
    ("flags", "supervised"),
    [
        *(({key: on}, True) for key in ("weight", "train", "loss") for on in (1, 1.0, True)),
        *(({key: off}, False) for key in ("weight", "training", "trainable") for off in (0, 0.0)),
        ({"train_on_turn": False}, False),
        ({"masked": True}, False),
        ({"masked": False, "weight": 1}, True),
        ({"masked": True, "weight": 0, "train": False}, False),
        ({"weight": None, "train_detail": [], "training_detail": None}, True),
    ],
)
@pytest.mark.parametrize("sharegpt", [False, True])
def test_flags_of_an_answer_are_read(
    flags: dict[str, Any], supervised: bool, sharegpt: bool, one: One
) -> None:
    if sharegpt:
        turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", **flags}]
        found = one(conversations=turns)
    else:
        found = one(_user(), _answer(**flags))
    assert found.messages == [_user(), _answer()]
    assert found.unsupervised == (frozenset() if supervised else frozenset([1]))


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        ([_user(), _answer(weight=0.5)], "a training flag that is not on or off"),
        ([_user(), _answer(train="yes")], "a training flag that is not on or off"),
        ([_user(), _answer(loss=[1])], "a training flag that is not on or off"),
        ([_user(), _answer(weight=1, train=False)], "contradicting training flags"),
        ([_user(), _answer(weight=1, masked=True)], "contradicting training flags"),
        ([_user(), _answer(train_detail=[{"begin_offset": 0}])], "supervised ranges of characters"),
        ([_user(weight=1), _answer()], "training on a turn that is no answer"),
        ([_user(train=True), _answer()], "training on a turn that is no answer"),
        ([_user(), _answer(prefix="x")], "a training flag that is not on or off"),
        ([_user(), _answer(prefix=True), _user()], "a beginning that is not last"),
        ([_user(prefix=True)], "a beginning that is not last"),
        ([_user(), {"role": "narrator", "content": "x"}], "unknown role"),
        ([_user(), {"role": 3, "content": "x"}], "unknown role"),
        ([_user(), {"role": None, "content": "x"}], "no role"),
        ([_user(), "text"], "no role"),
    ],
)
def test_flags_that_cannot_be_honoured_are_named(messages: list[Any], kind: str, one: One) -> None:
    with pytest.raises(BadRow) as caught:
        one(*messages)
    assert caught.value.kind == kind


def test_flags_that_ask_nothing_of_context_are_fine(one: One) -> None:
    found = one(_user(weight=0, masked=False), _answer(), _user(train=False, prefix=False))
    assert found == Conversation([_user(), _answer(), _user()])


def test_the_beginning_of_an_answer(one: One) -> None:
    found = one(_user(), _answer("Once upon", prefix=True))
    assert found == Conversation([_user(), _answer("Once upon")], unfinished=True)
    assert one(_user(), _answer(prefix=False)) == Conversation([_user(), _answer()])


def test_developer_becomes_system_and_is_remembered(one: One) -> None:
    system = {"role": "system", "content": "s"}
    found = one(system, {"role": "Developer", "content": "d"}, _user())
    assert found.messages == [system, {"role": "system", "content": "d"}, _user()]
    assert found.developer == frozenset([1])


def test_a_message_of_two_formats_that_differ_is_refused(write_jsonl: Write) -> None:
    turn = {"from": "human", "value": "q", "role": "human", "content": "q"}
    turns = [turn, {**turn, "role": "assistant"}, {**turn, "content": "other"}]
    path = write_jsonl([{"conversations": [turn]} for turn in turns])
    same, role, content = interpreted(path, format="sharegpt")
    assert same == Conversation([_user()])
    for bad in (role, content):
        assert isinstance(bad, BadRow)
        assert "two roles or two contents" in str(bad)


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_answer_is_one_in_every_format(empty: str | None, one: One) -> None:
    wanted = [_user(), _answer("")]
    assert one(_user(), _answer(empty)) == Conversation(wanted)
    assert one(prompt="q", completion=empty) == Conversation(wanted, first_supervised=1)
    assert one(instruction="q", output=empty) == Conversation(wanted)
    assert one(prompt=[_user()], completion=[]) == Conversation(wanted, first_supervised=1)
    assert one(prompt=[], completion=empty) == Conversation([])
    assert one(instruction="", output=empty) == Conversation([])
    # The teacher answers: nothing stands in the answer's place.
    for columns in ({"prompt": "q", "completion": empty}, {"prompt": "q"}):
        assert one(answered=False, **columns).messages == [_user()]
    for columns in ({"instruction": "q", "output": empty}, {"instruction": "q"}):
        assert one(answered=False, **columns).messages == [_user()]


@pytest.mark.parametrize("completion", [" the end.", [_answer(" the end.")]])
@pytest.mark.parametrize("prefix", [None, True])
def test_a_completion_continues_the_answer_of_its_prompt(
    completion: Any, prefix: bool | None, one: One
) -> None:
    begun = _answer("Once,", reasoning="why", weight=0, prefix=prefix)
    found = one(prompt=[_user(), begun], completion=completion, system="s")
    assert found == Conversation(
        [
            {"role": "system", "content": "s"},
            _user(),
            _answer("Once, the end.", reasoning_content="why"),
        ],
        first_supervised=2,
        answer_prefix="Once,",
    )


@pytest.mark.parametrize("completion", [{}, {"completion": None}, {"completion": "the end."}])
def test_who_answers_goes_on_where_the_prompt_ends(completion: dict[str, Any], one: One) -> None:
    prompt = [_user(), _answer("Once,")]
    found = one(answered=False, prompt=prompt, **completion)
    assert (found.messages, found.unfinished) == (prompt, True)


def test_a_completion_that_cannot_continue_its_prompt(one: One) -> None:
    call = {"name": "f", "arguments": {}}
    found = one(prompt=[_user(), _answer("x", tool_calls=[call])], completion="y")
    assert (len(found.messages), found.first_supervised, found.answer_prefix) == (3, 2, "")
    with pytest.raises(BadRow, match="the completion does not continue"):
        one(prompt=[_user(), _answer(prefix=True)], completion=[_user(), _answer()])
    for begun, first in (
        (_answer("Once"), _answer("b", reasoning="why")),
        (_answer("", reasoning="why"), _answer("b")),
    ):
        with pytest.raises(BadRow) as caught:
            one(prompt=[_user(), begun], completion=[first])
        assert caught.value.kind == "reasoning after text"
    with pytest.raises(BadRow, match="asks for training on a turn that is context"):
        one(prompt=[_user(), _answer(train=True), _user()], completion="y")


def test_numbers_of_turns_move_with_the_sides_and_the_system_message(one: One) -> None:
    prompt = [{"role": "developer", "content": "d"}, _user(), _answer(weight=0), _user()]
    completion = [
        _answer("1", train=False), _user(), {"role": "developer", "content": "e"}, _answer("2"),
    ]  # fmt: skip
    found = one(prompt=prompt, completion=completion)
    assert found.first_supervised == 4
    assert found.developer == frozenset([0, 6])
    assert found.unsupervised == frozenset([2, 4])
    assert with_system(found, "s") is found  # it has one
    moved = with_system(
        Conversation([_user(), _answer()], 1, None, frozenset([0]), frozenset([1]), True, "a"), "s"
    )
    assert moved == Conversation(
        [{"role": "system", "content": "s"}, _user(), _answer()],
        2, None, frozenset([1]), frozenset([2]), True, "a",
    )  # fmt: skip


HALF = "a\ud83db"


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ({"text": HALF}, "line 1, the text: character 2 is half of a surrogate pair (\\ud83d)"),
        ({"messages": [_user(HALF)]}, "line 1, message 1, content: character 2"),
        ({"messages": json.dumps([_user(HALF)])}, "line 1, message 1, content"),
        ({"messages": [_user(), _answer(reasoning=HALF)]}, "message 2, reasoning_content"),
        ({"messages": [_user(**{HALF: "x"})]}, "message 1, a key"),
        ({"messages": [_user()], "tools": [{"name": HALF}]}, "line 1, tools[0].name"),
        ({"messages": [_user()], "tools": [{HALF: 1}]}, "line 1, a key of tools[0]"),
        ({"messages": [_user()], "tools": json.dumps([{"name": HALF}])}, "tools[0].name"),
        ({"messages": [_user()], "system": HALF}, "message 1, content"),
        (
            {
                "messages": [
                    _answer(tool_calls=[{"name": "f", "arguments": json.dumps({"x": HALF})}])
                ]
            },
            "message 1, tool_calls[0].function.arguments.x",
        ),
        ({"prompt": "q", "completion": HALF}, "message 2, content"),
        ({"instruction": "q", "output": HALF}, "message 2, content"),
        ({"prompt": [_answer(HALF)], "completion": "x"}, "message 1, content"),
    ],
)
def test_half_a_surrogate_pair_is_refused_or_replaced(
    row: dict[str, Any], where: str, write_jsonl: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl([{**row, "unused\ud83d": HALF}])
    (bad,) = interpreted(path)
    assert isinstance(bad, BadRow)
    assert bad.kind == "not Unicode"
    assert where in str(bad)
    assert not caplog.records
    (found,) = interpreted(path, invalid_unicode="replace")
    assert not isinstance(found, BadRow)
    assert "\\ud83d" not in repr(found)
    assert "a\ufffdb" in repr(found)
    assert "1 texts were not valid Unicode" in caplog.text


def test_whole_pairs_are_text(write_jsonl: Write) -> None:
    path = write_jsonl([{"text": "\U0001f600 é"}])
    assert "\\ud83d\\ude00" in path.read_text()
    assert interpreted(path, invalid_unicode="replace") == [Document("\U0001f600 é")]


def test_an_unknown_role_that_is_no_unicode_can_be_printed(write_jsonl: Write) -> None:
    path = write_jsonl([{"messages": [_user(), {"role": HALF, "content": "x"}]}, {HALF: 1}])
    first, second = interpreted(path)
    assert isinstance(first, BadRow)
    assert first.kind == "unknown role"
    assert isinstance(second, BadRow)
    assert second.kind == "missing column"
