"""Tokens at the edges of turns: a turn's mask changes no token that it need not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Build = Callable[..., Any]

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>Says:\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>Says:\n' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "\nIt is so."},
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "It is so."},
]


def _tokenizer(kind: str, *, takes_space: bool = False) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "legacy":
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        inner.normalizer = normalizers.Sequence(steps)
    else:
        scheme: Any = kind
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    inner.train_from_iterator(["Says:\n\nIt is so. Says:\nIt is so? "] * 20, trainer)
    inner.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, rstrip=takes_space)
            for token in ("<|user|>", "<|assistant|>", "<|end|>")
        ]
    )
    wrap: Any = PreTrainedTokenizerFast
    made = wrap(tokenizer_object=inner, eos_token="<|end|>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def _parts(tokens: list[str]) -> list[list[str]]:
    """Return the tokens of each message."""
    parts: list[list[str]] = []
    for token in tokens:
        parts += [[]] if token in ("<|user|>", "<|assistant|>") else []
        parts[-1].append(token)
    return parts


@pytest.mark.parametrize("kind", ["legacy", "always", "first", "never"])
def test_text_after_a_divided_token_is_encoded_as_in_the_whole(
    kind: str, build: Build, write_jsonl: Build
) -> None:
    using = _tokenizer(kind)
    (sample,) = build(write_jsonl([{"messages": CHAT}]), using=using).samples
    found = _parts(using.convert_ids_to_tokens(sample.input_ids.tolist()))
    whole = using.tokenize(using.apply_chat_template(CHAT, tokenize=False))
    wanted = _parts(whole)
    assert found[1] != wanted[1]  # the answer's first token is divided
    assert [found[0], found[2]] == [wanted[0], wanted[2]]


def test_an_end_that_takes_white_space_stays_one_token(build: Build, write_jsonl: Build) -> None:
    using = _tokenizer("never", takes_space=True)
    (sample,) = build(write_jsonl([{"messages": CHAT}]), using=using).samples
    tokens = using.convert_ids_to_tokens(sample.input_ids.tolist())
    ends = [number for number, token in enumerate(tokens) if token == "<|end|>"]
    assert [sample.loss_mask[number] for number in ends] == [False, True, False, True]
    following = [tokens[number + 1] for number in ends[:-1]]
    assert following == ["<|assistant|>", "<|user|>", "<|assistant|>"]
    assert ends[-1] == len(tokens) - 1
