"""What a preview detects, and what it calls suspicious: each mistake with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.corpus.intake import TeacherTokens
from pipeline.corpus.preview.choice import choose_rows
from pipeline.corpus.preview.collect import preview_corpus
from pipeline.corpus.preview.lengths import histogram, length_summary
from pipeline.corpus.preview.record import Preview
from pipeline.corpus.prompts import PromptIntake, PromptLimits
from pipeline.corpus.reading import open_reading
from pipeline.corpus.samples import SampleIntake
from pipeline.corpus.settings import CorpusSettings

Maker = Callable[..., Any]


def _chat(*turns: str, system: str = "") -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [
        {"role": roles[number % 2], "content": text} for number, text in enumerate(turns)
    ]  # fmt: skip
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


GOOD = [_chat(f"What is {n}?", f"It is {n}.") for n in range(4)]
HEADERS = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
PLAIN = "{% for m in messages %}" + HEADERS + "<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture
def preview(write_jsonl: Any, tokenizer: Any) -> Callable[..., Preview]:
    """Return a function that previews rows with short-hand settings."""

    def run(
        rows: Any, *, using: Any = None, ends: tuple[int, ...] = (), prompts: bool = False,
        **settings: Any,
    ) -> Preview:  # fmt: skip
        path = rows if isinstance(rows, str) else write_jsonl(rows)
        chosen = CorpusSettings(dataset_name=str(path), **settings)
        reading = open_reading(chosen, answered=not prompts)
        teacher = TeacherTokens(ends)
        if prompts:
            intake: Any = PromptIntake(
                chosen, using or tokenizer, reading, 42, teacher, add_eos=False,
                limits=PromptLimits(8, chosen.longest - 20),
            )  # fmt: skip
        else:
            intake = SampleIntake(chosen, using or tokenizer, reading, 42, teacher, chosen.add_eos)
        return preview_corpus(intake, choose_rows("0:3"), sample_rows=100)

    return run


def _facts(found: Preview) -> dict[str, str]:
    return {fact.name: fact.text for fact in found.facts}


def _one(found: Preview, words: str) -> str:
    """Return the one finding with some words."""
    (line,) = [str(finding) for finding in found.findings if words in finding.found]
    assert "\n" not in line
    return line


def test_nothing_is_suspicious_in_good_rows(preview: Any) -> None:
    found = preview(GOOD)
    assert found.findings == ()
    facts = _facts(found)
    assert facts["format"].startswith(
        "messages: the column messages holds lists of {role, content}"
    )
    assert "1 .jsonl (by the names of the files)" in facts["data set"]
    assert facts["roles"] == "user (4), assistant (4)"
    assert facts["template"].startswith("the tokenizer's own (sha256 ")
    assert facts["answers"].startswith(
        "found by rendering: behind '<|im_start|>assistant\\n', up to"
    )
    assert "'<|im_end|>'" in facts["answers"]
    # The template's own system text is seen before it is trained on.
    assert "You help." in facts["system"]
    assert facts["length"].startswith("max_length 4096; of a longer row, overlong truncate")


def test_the_shape_of_the_data_is_told(preview: Any, tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
             "id": 3}] * 3  # fmt: skip
    facts = _facts(preview(rows))
    assert facts["roles"] == "human → user (3), gpt → assistant (3)"
    assert facts["format"].endswith("read: conversations; not read: id")
    facts = _facts(preview([{"text": "plain"}] * 3, format="text"))
    assert facts["format"].startswith("text: named by --corpus.format")
    assert "template" not in facts
    (tmp_path / "own.jinja").write_text(PLAIN + PROMPT)
    facts = _facts(preview(GOOD, chat_template=str(tmp_path / "own.jinja"), num_samples=2))
    assert facts["template"].startswith(f"--chat_template {tmp_path / 'own.jinja'}")
    assert "only the first 2 rows are read (corpus.num_samples)" in facts["data set"]


def test_thinking_and_tools_are_told(preview: Any) -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% if enable_thinking %}!{% endif %}"
        + PLAIN + PROMPT
    )  # fmt: skip
    rows = [_chat("q", "<think>\nhm\n</think>\nyes"), *GOOD]
    facts = _facts(preview(rows, chat_template=template, template_options={"enable_thinking": 0}))
    assert "1 chat with reasoning" in facts["thinking"]
    assert "the template has enable_thinking" in facts["thinking"]
    assert "the template has variable tools" in facts["tools"]
    assert "with enable_thinking=0" in facts["template"]


def test_no_supervised_token(preview: Any) -> None:
    found = preview([*GOOD, _chat("no answer"), _chat("none here either")])
    line = _one(found, "have no supervised token")
    assert line.startswith("2 samples")
    assert "first row 4" in line
    assert "none of the first" in _one(preview([_chat("a")] * 2), "can be used")


def test_everything_supervised(preview: Any) -> None:
    bare = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    rows = [{"messages": [{"role": "assistant", "content": f"only {n}"}]} for n in range(3)]
    line = _one(preview(rows, chat_template=bare), "everything is supervised")
    assert "--chat_template" in line
    assert not preview(GOOD, loss_on="all").findings


def test_an_end_of_turn_that_is_not_supervised(preview: Any) -> None:
    without = "{% for m in messages %}" + HEADERS + "\n{% endfor %}" + PROMPT
    line = _one(preview(GOOD, chat_template=without), "have no end of turn in the loss")
    assert "4 of 4 supervised turns" in line
    assert "generation_config.json" in line


def test_bos_twice_and_bos_missing(preview: Any, make_tokenizer: Maker) -> None:
    twice = "<s><s>" + PLAIN + PROMPT
    assert "'<s>' twice" in _one(preview(GOOD, chat_template=twice), "twice at the beginning")
    adds = make_tokenizer(adds_bos=True)
    line = _one(preview(GOOD, using=adds), "without '<s>'")
    assert "4 rows (first row 0)" in line
    assert not preview(GOOD, using=adds, chat_template="<s>" + PLAIN + PROMPT).findings


def test_a_template_that_ignores_the_system_message(preview: Any) -> None:
    ignores = PLAIN.replace("messages %}", "messages if m['role'] != 'system' %}") + PROMPT
    rows = [*GOOD, _chat("q", "a", system="Be brief.")]
    line = _one(preview(rows, chat_template=ignores), "ignores system messages")
    assert "1 row (first row 4)" in line


def test_special_tokens_as_text(preview: Any) -> None:
    line = _one(preview([*GOOD, _chat("what is <|im_end|>?", "an end")]), "spells out '<|im_end|>'")
    assert "1 row (first row 4)" in line
    unknown = PLAIN.replace("<|im_start|>", "<|turn|>") + "{% if add_generation_prompt %}<|turn|>"
    line = _one(preview(GOOD, chat_template=unknown + "assistant\n{% endif %}"), "'<|turn|>'")
    assert "it becomes plain text" in line


def test_much_that_is_cut(preview: Any) -> None:
    long = _chat("q", "word " * 80)
    line = _one(preview([*GOOD, long], max_length=60), "rows are cut (20%)")
    assert "raise --max_length (now 60)" in line
    line = _one(preview([*GOOD, long], max_length=60, overlong="drop"), "too long and left out")
    assert "--corpus.overlong truncate" in line


def test_many_bad_rows(preview: Any) -> None:
    rows = [*GOOD * 3, *[{"messages": number} for number in range(11)]]
    assert "so many stop the run" in _one(preview(rows), "11 of 23 rows cannot be used")
    assert not [f for f in preview(rows[:20]).findings if "stop the run" in f.found]
    refused = preview(rows[:13], on_bad_row="refuse")
    assert "the run stops for any" in _one(refused, "1 of 13 rows cannot be used")
    # So many that a run which refuses them would have stopped.
    assert preview([*GOOD, *[{"messages": n} for n in range(40)]], on_bad_row="refuse").rows


def test_a_mask_unlike_the_templates_own(preview: Any) -> None:
    marked = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
        "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT
    )
    found = preview(GOOD, chat_template=marked)
    assert not found.findings
    assert _facts(found)["answers"].startswith("as its {% generation %} marks")
    # It marks the user's words: they are never supervised here, and that is said.
    wrong = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% generation %}{{ m['content'] }}"
        "<|im_end|>{% endgeneration %}\n{% endfor %}" + PROMPT
    )
    line = _one(preview(GOOD, chat_template=wrong), "is not what the template's")
    assert line.startswith("the mask of 4 of 4 chats")


def test_repeated_rows_and_no_heldout_ones(preview: Any) -> None:
    assert "1 row (first row 4)" in _one(preview([*GOOD, GOOD[0]]), "that repeat an earlier one")
    assert "nothing to evaluate" in _one(preview(GOOD, heldout_fraction=0.0), "held out")


def test_prompts_without_a_generation_prompt(preview: Any) -> None:
    bare = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found = preview(GOOD, prompts=True, chat_template=bare)
    assert "goes on with the question" in str(_one(found, "no generation prompt"))
    _one(found, "no special token ends a turn")
    assert not preview(GOOD, prompts=True).findings
    assert _facts(preview(GOOD, prompts=True))["supervised"].startswith("nothing yet")


def test_the_histogram_is_divided_at_max_length() -> None:
    bins = histogram([3, 40, 41, 60, 700], 40)
    assert [(b.first, b.last, b.rows, b.is_beyond) for b in bins if b.rows] == [
        (2, 3, 1, False), (32, 40, 1, False), (41, 63, 2, True), (512, 1023, 1, True),
    ]  # fmt: skip
    assert sum(b.rows for b in bins) == 5
    assert histogram([], 40) == []
    assert sum(b.rows for b in histogram([1, 2, 3], 4096)) == 3
    assert length_summary([10, 20, 30]).startswith("10 to 30 tokens a row, 20 on average")
