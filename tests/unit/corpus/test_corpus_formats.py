"""Every format, its detection, and the message when rows fit none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.corpus.chat.conversation import Conversation, put_system
from pipeline.errors import CorpusError

Build = Callable[..., Any]

CHATS: dict[str, dict[str, Any]] = {
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]
    },
    "messages": {
        "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    },
    "prompt_completion": {"prompt": "Hi?", "completion": "Yes."},
    "instruction": {"instruction": "Hi?", "input": "", "output": "Yes."},
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "detected"])
@pytest.mark.parametrize("format_name", list(CHATS))
def test_chat_formats_give_the_same_tokens(
    format_name: str, named: bool, build: Build, write_jsonl: Build, labels: Build, tokenizer: Any
) -> None:
    extra = {"format": format_name} if named else {}
    corpus = build(write_jsonl([CHATS[format_name]]), **extra)
    (sample,) = corpus.samples
    assert tokenizer.decode(sample.input_ids) == (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert labels(sample) == "Yes.<|im_end|>"
    assert corpus.identity["format"] == format_name


def test_text_counts_all_but_the_first_token_and_ends_with_eos(
    build: Build, write_jsonl: Build, tokenizer: Any
) -> None:
    corpus = build(write_jsonl([{"text": "what does it do"}]))
    (sample,) = corpus.samples
    assert tokenizer.decode(sample.input_ids) == "what does it do<|im_end|>"
    assert not sample.loss_mask[0]
    assert sample.loss_mask[1:].all()
    (bare,) = build(write_jsonl([{"text": "what does it do"}]), add_eos=False).samples
    assert sample.input_ids[:-1].tolist() == bare.input_ids.tolist()


def test_instruction_joins_its_input(build: Build, write_jsonl: Build, tokenizer: Any) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."}
    (sample,) = build(write_jsonl([row])).samples
    text = tokenizer.decode(sample.input_ids)
    assert "user\nAdd.\n\n1 2<|im_end|>" in text
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_completion_of_messages_counts_the_completion_only(
    build: Build, write_jsonl: Build, labels: Build
) -> None:
    row = {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "context"},
            {"role": "user", "content": "b"},
        ],
        "completion": [{"role": "assistant", "content": "supervised"}],
    }
    (sample,) = build(write_jsonl([row])).samples
    assert labels(sample) == "supervised<|im_end|>"


def test_content_parts_are_joined_and_images_refused(
    build: Build, write_jsonl: Build, labels: Build
) -> None:
    def row(part: dict[str, str]) -> dict[str, Any]:
        content = [{"type": "text", "text": "one "}, part]
        user = {"role": "user", "content": "q"}
        return {"messages": [user, {"role": "assistant", "content": content}]}

    (sample,) = build(write_jsonl([row({"type": "text", "text": "two"})])).samples
    assert labels(sample) == "one two<|im_end|>"
    with pytest.raises(CorpusError, match=r"data.jsonl, line 1, message 2.*'image_url'"):
        build(write_jsonl([row({"type": "image_url", "image_url": "x"})]), on_bad_row="refuse")


def test_role_names_are_unified(build: Build, write_jsonl: Build, tokenizer: Any) -> None:
    roles = ["system", "Human", "function_call", "observation", "chatgpt"]
    row = {"conversations": [{"from": role, "value": role} for role in roles]}
    (sample,) = build(write_jsonl([row])).samples
    text = tokenizer.decode(sample.input_ids)
    parts = text.split("<|im_start|>")[1:]
    found = [part.split("\n")[0] for part in parts]
    assert found == ["system", "user", "assistant", "tool", "assistant"]


def test_unknown_role_is_named_with_its_row(build: Build, write_jsonl: Build) -> None:
    good = CHATS["messages"]
    bad = {"messages": [{"role": "narrator", "content": "Once"}]}
    with pytest.raises(CorpusError, match=r"line 3, message 1: the role 'narrator' is unknown"):
        build(write_jsonl([good, good, bad]), on_bad_row="refuse")


def test_message_without_role_is_named(build: Build, write_jsonl: Build) -> None:
    rows = [CHATS["messages"], {"messages": [{"speaker": "user", "content": "a"}]}]
    with pytest.raises(CorpusError, match=r"line 2, message 1: has no 'role'.*speaker, content"):
        build(write_jsonl(rows), on_bad_row="refuse")


def test_columns_that_fit_nothing_are_listed(build: Build, write_jsonl: Build) -> None:
    with pytest.raises(CorpusError) as caught:
        build(write_jsonl([{"foo": 1, "bar": "x"}]))
    message = str(caught.value)
    assert "foo (int), bar (str)" in message
    for name in (*CHATS, "text"):
        assert name in message


def test_named_format_that_does_not_fit_says_what_is_missing(
    build: Build, write_jsonl: Build
) -> None:
    with pytest.raises(CorpusError, match="lacks the column completion"):
        build(write_jsonl([{"prompt": "a"}]), format="prompt_completion")
    with pytest.raises(CorpusError, match="lacks the column messages or conversations"):
        build(write_jsonl([{"prompt": "a"}]), format="sharegpt")


def test_unusual_column_is_read_by_name(build: Build, write_jsonl: Build, labels: Build) -> None:
    rows = [{"body": "what does it do", "id": 3}]
    assert build(write_jsonl(rows), column="body").identity["format"] == "text"
    chat = [{"talk": CHATS["sharegpt"]["conversations"]}]
    corpus = build(write_jsonl(chat), column="talk")
    assert labels(corpus.samples[0]) == "Yes.<|im_end|>"
    with pytest.raises(CorpusError, match="there is no column 'absent'; expected one of talk"):
        build(write_jsonl(chat), column="absent")


def test_row_that_lacks_the_column_is_named(build: Build, write_jsonl: Build) -> None:
    with pytest.raises(CorpusError, match=r"line 2: the column 'text' is missing"):
        build(write_jsonl([{"text": "abc"}, {"txt": "abc"}]), on_bad_row="refuse")


def test_detection_looks_past_empty_first_rows(build: Build, write_jsonl: Build) -> None:
    corpus = build(write_jsonl([{"conversations": []}, CHATS["sharegpt"]]))
    assert corpus.identity["format"] == "sharegpt"
    assert corpus.counts.dropped_no_labels == 1
    assert [sample.source_index for sample in corpus.samples] == [1]


def test_tool_calls_reach_the_template(
    build: Build, write_jsonl: Build, make_tokenizer: Build
) -> None:
    template = (
        "{% if tools %}{{ tools[0]['name'] }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.tool_calls %}CALL {{ m.tool_calls[0].function.name }}{% endif %}<|im_end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    using = make_tokenizer(template=template)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "lookup"}]}
    row = {"messages": [{"role": "user", "content": "q"}, call], "tools": '[{"name": "T1"}]'}
    (sample,) = build(write_jsonl([row]), using=using).samples
    text = using.decode(sample.input_ids)
    assert text.startswith("T1<|im_start|>user")
    assert using.decode(sample.input_ids[sample.loss_mask]) == "CALL lookup<|im_end|>"


def test_a_system_column_does_not_precede_a_system_message(
    build: Build, write_jsonl: Build, tokenizer: Any
) -> None:
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "it"}]
    own = [{"role": "system", "content": "Be kind."}, *turns]
    rows = [{"system": "Be exact.", "messages": own}, {"system": "Be exact.", "messages": turns}]
    first, second = (
        tokenizer.decode(sample.input_ids) for sample in build(write_jsonl(rows)).samples
    )
    assert first.count("<|im_start|>system") == second.count("<|im_start|>system") == 1
    assert "Be kind." in first
    assert "Be exact." not in first
    assert "Be exact." in second


def test_a_system_message_moves_all_that_counts_by_messages() -> None:
    chat = Conversation(
        [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "assistant")],
        first_supervised=2, developer=frozenset({0}), unsupervised=frozenset({3}),
    )  # fmt: skip
    moved = put_system(chat, "be brief")
    assert moved.messages == [{"role": "system", "content": "be brief"}, *chat.messages]
    assert moved.first_supervised == 3
    assert (moved.developer, moved.unsupervised) == (frozenset({1}), frozenset({4}))
