"""Which tokens are supervised: checked by decoding them, for templates of every kind."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CorpusError

Build = Callable[..., Any]

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "First?"},
    {"role": "assistant", "content": "One, naïve 日本."},
    {"role": "user", "content": "One, naïve 日本."},
    {"role": "assistant", "content": "Two\n\nlines."},
]
SUPERVISED = "One, naïve 日本.<|im_end|>Two\n\nlines.<|im_end|>"

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
# Like Qwen 3: only the assistant's last turn has an empty thought.
LAST_DIFFERS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNSTABLE = "{{ messages|length }}{% for m in messages %}{{ m.content|upper }};{% endfor %}"
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '[' + m.role + ']' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
# In the manner of templates that people use; `A` is the assistant's header, as prompt and in chats.
_CALLS = "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + '</call>' }}{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_OTHERS = "{% if m.role != 'assistant' %}{{ m.role + ':' + m.content + '<|im_end|>\n' }}{% else %}"
MARKED_CALLS = (
    "{% for m in messages %}" + _OTHERS + "{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ m.content }}" + _CALLS + "{{ '<|im_end|>\n' }}{% endgeneration %}{% endif %}{% endfor %}"
)
MARKED_APART = (
    "{% for m in messages %}" + _OTHERS + "{{ '<|im_start|>assistant\n' }}{% if m.tool_calls %}"
    "{% generation %}" + _CALLS + "{% endgeneration %}{% endif %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% endif %}{% endfor %}"
)
THOUGHT_OPENED = (
    "{% for m in messages %}" + _OTHERS + "{{ '<|im_start|>assistant\n<think></think>' }}"
    "{{ m.content }}"
    + _CALLS
    + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    + _PROMPT.replace("assistant\n", "assistant\n<think>\n")
)
THOUGHT_ON_A_LINE = (
    "{% for m in messages %}" + _OTHERS + "{{ '<|im_start|>assistant\n<think></think>\n' }}"
    "{{ m.content }}"
    + _CALLS
    + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    + _PROMPT.replace("assistant\n", "assistant")
)
THOUGHT_LEFT_OUT = (
    "{% for m in messages %}"
    + _OTHERS
    + "{{ '<|im_start|>assistant\n' + m.content }}"
    + _CALLS.replace("<call>", "<tool_call>")
    + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    + _PROMPT.replace("assistant\n", "assistant\n<think>\n")
)
INDENTED = (
    "{% for m in messages %}"
    + _OTHERS
    + "{{ '    A:\n' + m.content }}"
    + _CALLS
    + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:\n{% endif %}"
)
CLOSED_BY_THE_NEXT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    + _CALLS
    + "{% if add_generation_prompt or not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RESULTS_INSIDE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    + _CALLS
    + "{% for r in messages if m.tool_calls and r.role == 'tool' %}{{ r.content }}{% endfor %}"
    "{{ m.content + '<|im_end|>\n' }}{% elif m.role != 'tool' %}{{ m.role + ':' + m.content }}"
    "{% endif %}{% endfor %}" + _PROMPT
)
_CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}
CALLED = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "result"},
    {"role": "assistant", "content": "Said."},
    {"role": "assistant", "content": "\nMore."},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "Then.", "tool_calls": [_CALL]},
]


@pytest.mark.parametrize(
    ("template", "call", "last"),
    [
        (MARKED_CALLS, "<call>", "Then.<call>look</call><|im_end|>"),
        (MARKED_APART, "<call>", "<call>look</call>Then.<|im_end|>"),
        (THOUGHT_OPENED, "<call>", "Then.<call>look</call><|im_end|>"),
        (THOUGHT_ON_A_LINE, "<call>", "Then.<call>look</call><|im_end|>"),
        (THOUGHT_LEFT_OUT, "<tool_call>", "Then.<tool_call>look</call><|im_end|>"),
        (INDENTED, "<call>", "Then.<call>look</call><|im_end|>"),
        (CLOSED_BY_THE_NEXT, "<call>", "Then.<call>look</call>"),
    ],
)
def test_all_that_an_answer_is_made_of_counts_and_no_more(
    template: str, call: str, last: str, build: Build, write_jsonl: Build, labels: Build
) -> None:
    path = write_jsonl([{"messages": CALLED}])
    (sample,) = build(path, chat_template=template).samples
    first = f"{call}look</call><|im_end|>"
    assert labels(sample) == first + "Said.<|im_end|>\nMore.<|im_end|>" + last


def test_an_answer_around_a_result_is_refused(build: Build, write_jsonl: Build) -> None:
    path = write_jsonl([{"messages": CALLED[:3]}, {"messages": CALLED}])
    with pytest.raises(CorpusError, match=r"line 2: message 7 .* around the text of message 3"):
        build(path, chat_template=RESULTS_INSIDE, on_bad_row="refuse")
    assert build(path, chat_template=RESULTS_INSIDE, on_bad_row="refuse", loss_on="all").samples


def test_multi_turn_counts_each_answer_with_its_end_token(
    build: Build, write_jsonl: Build, labels: Build
) -> None:
    (sample,) = build(write_jsonl([{"messages": TURNS}])).samples
    assert labels(sample) == SUPERVISED
    assert not sample.loss_mask[0]


def test_smollm_template_with_and_without_system(
    build: Build, write_jsonl: Build, labels: Build, smollm: Any
) -> None:
    rows = [{"messages": TURNS}, {"messages": TURNS[1:]}]
    with_system, without = build(write_jsonl(rows), using=smollm).samples
    assert labels(with_system, smollm) == SUPERVISED
    assert labels(without, smollm) == SUPERVISED
    text = smollm.decode(without.input_ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("Two\n\nlines.<|im_end|>\n")
    assert smollm.decode(with_system.input_ids).startswith("<|im_start|>system\nBe kind.")
    whole = smollm.apply_chat_template(TURNS[1:], return_dict=False)
    assert without.input_ids.tolist() == whole


def test_loss_on_all_counts_everything_but_the_first(build: Build, write_jsonl: Build) -> None:
    (sample,) = build(write_jsonl([{"messages": TURNS}]), loss_on="all").samples
    assert sample.loss_mask.tolist() == [False] + [True] * (len(sample.input_ids) - 1)


def test_generation_tags_decide_where_a_template_has_them(
    build: Build, write_jsonl: Build, labels: Build
) -> None:
    (sample,) = build(write_jsonl([{"messages": TURNS}]), chat_template=MARKED).samples
    assert labels(sample) == SUPERVISED
    row = {"prompt": TURNS[:4], "completion": TURNS[4:]}
    (sample,) = build(write_jsonl([row]), chat_template=MARKED).samples
    assert labels(sample) == "Two\n\nlines.<|im_end|>"


def test_template_whose_last_turn_differs(build: Build, write_jsonl: Build, labels: Build) -> None:
    (sample,) = build(write_jsonl([{"messages": TURNS}]), chat_template=LAST_DIFFERS).samples
    first, last = SUPERVISED.split("<|im_end|>")[:2]
    assert labels(sample) == SUPERVISED
    path = write_jsonl([{"messages": TURNS}])
    (sample,) = build(path, chat_template=LAST_DIFFERS, supervise_empty=True).samples
    assert labels(sample) == f"{first}<|im_end|><think>\n\n</think>\n\n{last}<|im_end|>"


def test_answer_that_opens_the_chat_counts(build: Build, write_jsonl: Build, labels: Build) -> None:
    # The default system prompt "You help." contains the answer as well: the position must be right.
    opening = [{"role": "assistant", "content": "help"}, {"role": "user", "content": "ok"}]
    (sample,) = build(write_jsonl([{"messages": opening}])).samples
    assert labels(sample) == "help<|im_end|>"
    ids = sample.input_ids[: sample.loss_mask.argmax()]
    assert len(ids) > 10


def test_template_that_cannot_be_located_is_an_error(build: Build, write_jsonl: Build) -> None:
    with pytest.raises(CorpusError, match=r"line 1: the messages cannot be found.*loss_on all"):
        build(write_jsonl([{"messages": TURNS}]), chat_template=UNSTABLE)
    assert build(write_jsonl([{"messages": TURNS}]), chat_template=UNSTABLE, loss_on="all").samples


def test_refused_rows_are_supervised_and_named(
    build: Build, write_jsonl: Build, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": TURNS[1:]}, {"messages": TURNS[2:]}]
    corpus = build(write_jsonl(rows), chat_template=ALTERNATING)
    assert corpus.counts.quarantined == 1
    assert "line 2: Conversation roles must alternate" in caplog.text
    with pytest.raises(CorpusError, match=r"1 rejected by the chat template.*must alternate"):
        build(write_jsonl(rows[1:]), chat_template=ALTERNATING)


def test_bos_occurs_once(build: Build, write_jsonl: Build, make_tokenizer: Build) -> None:
    using = make_tokenizer(template=ALTERNATING, adds_bos=True)
    assert using("a")["input_ids"][0] == using.bos_token_id
    (chat,) = build(write_jsonl([{"messages": TURNS[1:]}]), using=using).samples
    assert chat.input_ids.tolist().count(using.bos_token_id) == 1
    rows = [{"text": "what"}, {"text": "<s>what"}]
    plain, held = build(write_jsonl(rows), using=using).samples
    assert plain.input_ids.tolist() == held.input_ids.tolist()
    assert plain.input_ids.tolist().count(using.bos_token_id) == 1
    assert plain.loss_mask.tolist()[:2] == [False, True]
    (bare,) = build(write_jsonl(rows[:1]), using=using, add_bos=False).samples
    assert using.bos_token_id not in bare.input_ids.tolist()


def test_tokenizer_that_adds_no_bos_gets_none(
    build: Build, write_jsonl: Build, tokenizer: Any
) -> None:
    (sample,) = build(write_jsonl([{"text": "what"}])).samples
    assert tokenizer.bos_token_id not in sample.input_ids.tolist()


def test_system_prompt_goes_where_there_is_none(
    build: Build, write_jsonl: Build, tokenizer: Any, labels: Build
) -> None:
    rows = [{"messages": TURNS}, {"prompt": None, "messages": TURNS[1:]}]
    own, given = build(write_jsonl(rows), system_prompt="Be exact.").samples
    assert "Be kind." in tokenizer.decode(own.input_ids)
    assert "Be exact." not in tokenizer.decode(own.input_ids)
    assert tokenizer.decode(given.input_ids).startswith("<|im_start|>system\nBe exact.<|im_end|>")
    assert labels(given) == SUPERVISED


def test_system_prompt_keeps_a_prompt_uncounted(
    build: Build, write_jsonl: Build, labels: Build
) -> None:
    row = {"prompt": TURNS[1:3], "completion": TURNS[3:]}
    (sample,) = build(write_jsonl([row]), system_prompt="Be exact.").samples
    assert labels(sample) == "Two\n\nlines.<|im_end|>"


def test_template_comes_from_text_or_file(
    build: Build, write_jsonl: Build, tmp_path: Path, tokenizer: Any
) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(MARKED)
    path = write_jsonl([{"messages": TURNS}])
    by_file, by_text = build(path, chat_template=str(file)), build(path, chat_template=MARKED)
    assert by_file.identity == by_text.identity
    assert by_file.identity["chat_template_sha256"] != build(path).identity["chat_template_sha256"]
    with pytest.raises(CorpusError, match=r"absent.jinja cannot be read"):
        build(path, chat_template="absent.jinja")
    with pytest.raises(CorpusError, match="template has a mistake in line 1"):
        build(path, chat_template="{% for %}")


def test_one_of_several_templates_is_named(
    build: Build, write_jsonl: Build, make_tokenizer: Build, labels: Build
) -> None:
    path = write_jsonl([{"messages": TURNS}])
    using = make_tokenizer(template={"rag": MARKED, "tool_use": LAST_DIFFERS})
    with pytest.raises(CorpusError, match=r"several chat templates.*rag, tool_use"):
        build(path, using=using)
    (sample,) = build(path, using=using, chat_template="rag").samples
    assert labels(sample) == SUPERVISED
    using = make_tokenizer(template={"default": MARKED, "tool_use": "{% for %}"})
    (sample,) = build(path, using=using).samples
    assert labels(sample) == SUPERVISED


def test_chat_without_template_is_refused(
    build: Build, write_jsonl: Build, make_tokenizer: Build
) -> None:
    using = make_tokenizer(template=None)
    with pytest.raises(CorpusError, match=r"no chat template.*give --chat_template"):
        build(write_jsonl([{"messages": TURNS}]), using=using)
    assert build(write_jsonl([{"text": "plain"}]), using=using).samples


def test_todays_date_does_not_enter(build: Build, write_jsonl: Build, tokenizer: Any) -> None:
    dated = "{{ strftime_now('%Y-%m-%d') }}" + MARKED
    (sample,) = build(write_jsonl([{"messages": TURNS}]), chat_template=dated).samples
    text = tokenizer.decode(sample.input_ids)
    assert text.startswith("2024-07-26")
    assert str(datetime.date.today().year) not in text[:4]


def test_slow_tokenizer_is_refused(build: Build, write_jsonl: Build) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(CorpusError, match="fast tokenizer"):
        build(write_jsonl([{"text": "a"}]), using=Slow())
