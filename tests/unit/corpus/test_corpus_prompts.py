"""Prompts for a teacher that answers: the part of a row that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.split import prompt_id, response_id, response_seed, sample_id
from pipeline.errors import CorpusError
from tests.whole_corpus import Corpus, build_corpus, build_prompts

Build = Callable[..., Any]
SYSTEM = "<|im_start|>system\nYou help.<|im_end|>\n"
ASK = "<|im_start|>assistant\n"


@pytest.fixture
def prompts(tokenizer: Any) -> Build:
    def run(
        path: object, *, using: Any = None, document_tokens: int = 6, **settings: Any
    ) -> Corpus:
        most = settings.pop("max_tokens", 1000)
        settings.setdefault("heldout_fraction", 0.0)
        return build_prompts(
            CorpusSettings(dataset_name=str(path), **settings),
            tokenizer=using or tokenizer,
            seed=42,
            document_tokens=document_tokens,
            max_tokens=most,
        )

    return run


def _chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


U, A, S = ("user", "Hi?"), ("assistant", "Yes."), ("system", "Be brief.")
HI = "<|im_start|>user\nHi?<|im_end|>\n"
YES = "<|im_start|>assistant\nYes.<|im_end|>\n"


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ([U, A], SYSTEM + HI + ASK),
        ([U], SYSTEM + HI + ASK),
        ([S, U, A], "<|im_start|>system\nBe brief.<|im_end|>\n" + HI + ASK),
        ([U, A, U, A], SYSTEM + HI + YES + HI + ASK),
        ([U, A, A], SYSTEM + HI + ASK),
        # The last question has no answer: it is the prompt, not the one before it.
        ([U, A, U], SYSTEM + HI + YES + HI + ASK),
    ],
)
def test_a_chat_ends_with_the_generation_prompt(
    turns: list[tuple[str, str]], text: str, prompts: Build, write_jsonl: Build, tokenizer: Any
) -> None:
    built = prompts(write_jsonl([_chat(*turns)]))
    (prompt,) = built.samples
    assert tokenizer.decode(prompt.input_ids) == text
    assert built.end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_systems_message_of_the_settings(
    prompts: Build, write_jsonl: Build, tokenizer: Any
) -> None:
    path = write_jsonl([_chat(U, A), _chat(S, U, A)])
    first, second = prompts(path, system_prompt="Sing.").samples
    assert tokenizer.decode(first.input_ids).startswith("<|im_start|>system\nSing.<|im_end|>")
    assert tokenizer.decode(second.input_ids).startswith("<|im_start|>system\nBe brief.")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?"},
        {"prompt": "Hi?", "completion": ""},
        {"prompt": "Hi?", "completion": "Yes."},
        {"instruction": "Hi?", "output": "Yes."},
        {"instruction": "Hi?"},
        {"conversations": [{"from": "human", "value": "Hi?"}]},
    ],
)
def test_rows_with_and_without_answers_ask_the_same(
    row: dict[str, Any], prompts: Build, write_jsonl: Build, tokenizer: Any
) -> None:
    (prompt,) = prompts(write_jsonl([row])).samples
    assert tokenizer.decode(prompt.input_ids) == SYSTEM + HI + ASK


def test_a_corpus_still_needs_the_answers(build: Build, write_jsonl: Build) -> None:
    with pytest.raises(CorpusError, match="fit no known format"):
        build(write_jsonl([{"prompt": "Hi?"}]))


def test_the_answer_of_the_corpus_changes_nothing(prompts: Build, write_jsonl: Build) -> None:
    one = prompts(write_jsonl([_chat(U, A)]))
    other = prompts(write_jsonl([_chat(U, ("assistant", "Quite another."))]))
    assert one.content == other.content
    asked_otherwise = prompts(write_jsonl([_chat(("user", "Ho?"), A)]))
    assert asked_otherwise.content != one.content


def test_a_documents_first_tokens(
    prompts: Build, write_jsonl: Build, make_tokenizer: Build
) -> None:
    using = make_tokenizer(adds_bos=True)
    path = write_jsonl([{"text": "what does it do " * 5}, {"text": "does"}, {"text": "  "}])
    built = prompts(path, using=using)
    long, short = built.samples
    assert long.input_ids[0] == using.bos_token_id
    assert long.input_ids[1:].tolist() == using("what does it do " * 5)["input_ids"][1:6]
    assert len(long.input_ids) == 6
    # A short document is the prompt in full, without the EOS that would end it.
    assert short.input_ids.tolist() == [using.bos_token_id, *using("does")["input_ids"][1:]]
    assert built.counts.dropped_no_labels == 1
    assert built.end_of_turn is None


def test_long_prompts_keep_their_end_or_are_dropped(prompts: Build, write_jsonl: Build) -> None:
    path = write_jsonl([_chat(("user", "what does it do " * n), A) for n in (1, 9, 2)])
    whole = prompts(path)
    most = len(whole.samples[2].input_ids)
    cut = prompts(path, max_tokens=most)
    full = whole.samples[1].input_ids
    assert cut.samples[1].input_ids.tolist() == full[-most:].tolist()
    assert (cut.counts.truncated_rows, cut.counts.truncated_tokens) == (1, len(full) - most)
    kept = prompts(path, max_tokens=most, overlong="drop")
    assert [p.source_index for p in kept.samples] == [0, 2]
    assert kept.counts.dropped_overlong == 1
    assert kept.counts.samples == kept.counts.train == 2


def test_the_split_is_that_of_the_plain_corpus(
    prompts: Build, write_jsonl: Build, tokenizer: Any
) -> None:
    path = write_jsonl([_chat(("user", f"what {n}?"), A) for n in range(200)])
    chosen = CorpusSettings(dataset_name=str(path), heldout_fraction=0.2, heldout_samples=15)
    plain = build_corpus(chosen, tokenizer=tokenizer, seed=42)
    asked = prompts(path, heldout_fraction=0.2, heldout_samples=15)
    assert [p.split for p in asked.samples] == [s.split for s in plain.samples]
    assert asked.counts.heldout == 15
    # Identities are new ones: a response is not the row.
    names = {s.sample_id for s in plain.samples}
    own = {response_id(p.sample_id, n) for p in asked.samples for n in range(3)}
    assert len(own) == 600
    assert not own & names
    assert not {p.sample_id for p in asked.samples} & (names | own)


def test_what_gives_no_prompt_is_refused_in_words(prompts: Build, write_jsonl: Build) -> None:
    with pytest.raises(CorpusError) as caught:
        prompts(write_jsonl([_chat(A), _chat()]))
    assert "none of its 2 rows gave a prompt (2 without anything to answer" in str(caught.value)
    with pytest.raises(CorpusError, match="all of its 3 prompts are held out"):
        prompts(write_jsonl([_chat(U)] * 3), heldout_fraction=0.9999999)


def test_ids_and_seeds_never_change() -> None:
    """Frozen: caches of earlier versions continue with these."""
    name = prompt_id("chats", "7")
    assert name == "eb3a2552374c4f6a3105644055da1222"
    assert response_id(name, 0) == "ae424afc2fad44583a1287797af1c168"
    assert response_id(name, 1) == "b4fb0372cd6f40a625bda451f3523442"
    assert response_seed(42, response_id(name, 0)) == 1139839327146358729
    assert sample_id("chats", "7", 0) not in (name, response_id(name, 0))
    seeds = {response_seed(s, response_id(name, n)) for s in range(50) for n in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 1 << 63 for seed in seeds)


_LINES = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + CONTENT }}<|im_end|>\n{% endfor %}"
_ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_a_template_without_a_generation_prompt_still_opens_the_answer(
    prompts: Build, write_jsonl: Build, tokenizer: Any
) -> None:
    path = write_jsonl([_chat(U, A), _chat(U, A, U)])
    template = _LINES.replace("CONTENT", "m.content")
    texts = [tokenizer.decode(p.input_ids) for p in prompts(path, chat_template=template).samples]
    assert texts == [HI + ASK, HI + YES + HI + ASK]
    # Nothing but white space stands before an answer: there is no header to add.
    template = "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '<|im_end|>' }}"
    template = template.replace("m.role[0] + ':", "(m.role[0] if m.role == 'user' else '') + '")
    template += "{% endfor %}"
    texts = [tokenizer.decode(p.input_ids) for p in prompts(path, chat_template=template).samples]
    assert texts[0] == "u Hi?<|im_end|>"


def test_a_prompt_of_which_the_template_leaves_text_out_is_refused(
    prompts: Build, write_jsonl: Build, tokenizer: Any
) -> None:
    template = _LINES.replace("CONTENT", "m.content.split('</think>')[-1]") + _ASKS
    thought = ("assistant", "<think>Hm.</think>Yes.")
    path = write_jsonl([_chat(U, thought, U, A), _chat(("user", "a</think>b"), A), _chat(U, A)])
    with pytest.raises(CorpusError, match=r"(?s)line 1: message 2 .*reasoning.*line 2: the mess"):
        prompts(path, chat_template=template, on_bad_row="refuse")
    found = prompts(path, chat_template=template, reasoning="template").samples
    assert [tokenizer.decode(p.input_ids) for p in found] == [HI + YES + HI + ASK, HI + ASK]
