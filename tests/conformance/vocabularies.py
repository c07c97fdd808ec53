"""Small tokenizers of every kind, trained on the chats' own text; nothing is downloaded."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from tests.conformance.chats import CHATS
from tests.conformance.templates import MARKS, SPECIAL, Template

__all__ = ["KINDS", "comparable", "holds", "tokenizer_of"]

_VOCABULARY = 500
_BYTES = [f"<0x{number:02X}>" for number in range(256)]


def _same(text: str) -> str:
    return text


def _spaced(text: str) -> str:
    """SentencePiece's mark is a space after decoding, in the text and in special tokens."""
    return text.replace("\u2581", " ")


def _without_spaces(text: str) -> str:
    """Return what is left where a tokenizer adds a space before every piece of text."""
    return _spaced(text).replace(" ", "")


def _bare(text: str) -> str:
    return "".join(text.split()).lower()


_COMPARED: dict[str, Callable[[str], str]] = {
    "bytes": _same,
    "bytes_trimmed": _same,
    "bytes_prefix": _without_spaces,
    "bytes_prefix_trimmed": _without_spaces,
    "metaspace_always": _without_spaces,
    "metaspace_first": _without_spaces,
    "metaspace_never": _spaced,
    "llama_legacy": _without_spaces,
    "unigram_always": _without_spaces,
    "unigram_never": _spaced,
    "wordpiece": _bare,
}
KINDS = tuple(_COMPARED)


def comparable(kind: str, text: str) -> str:
    """Return what of a text survives the tokenizer's round trip."""
    return _COMPARED[kind](text)


def holds(kind: str, text: str) -> bool:
    """Whether the round trip keeps the text but for `comparable`."""
    return kind != "wordpiece" or (
        text.isascii() and all(c.isprintable() or c in "\n\t" for c in text)
    )


def tokenizer_of(kind: str, template: Template) -> Any:
    """Return the tokenizer of a kind with a template and its special tokens."""
    return _wrapped(kind, template.bos, template.eos, template.text)


@functools.cache
def _wrapped(kind: str, bos: str, eos: str, text: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    wrap: Any = PreTrainedTokenizerFast
    tokenizer = wrap(
        tokenizer_object=_trained(kind), bos_token=bos, eos_token=eos, unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = text
    return tokenizer


@functools.cache
def _texts() -> list[str]:
    """Return the rows as text, the very long ones once and shortened."""
    rows = (json.dumps(chat.row, ensure_ascii=False)[:2_000] for chat in CHATS)
    return [row.encode("utf-8", "replace").decode() for row in rows]


@functools.cache
def _trained(kind: str) -> Any:
    from tokenizers import AddedToken

    make = {"bytes": _byte_level, "wordpiece": _wordpiece, "unigram": _unigram}
    inner = make.get(kind.split("_")[0], _metaspace)(kind)
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    inner.add_tokens([AddedToken(token, normalized=False) for token in MARKS])
    return inner


def _byte_level(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    inner = Tokenizer(models.BPE())
    prefix = "prefix" in kind
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.post_processor = processors.ByteLevel(
        add_prefix_space=prefix, trim_offsets="trimmed" in kind
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(_texts(), trainer)
    return inner


def _spaces_marked(inner: Any, kind: str) -> Any:
    """Give `inner` SentencePiece's treatment of spaces."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    if kind == "llama_legacy":
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        inner.normalizer = normalizers.Sequence(steps)
    else:
        scheme: Any = kind.rsplit("_", 1)[1]
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return inner


def _metaspace(kind: str) -> Any:
    """Train a BPE, then give it all bytes for what it does not know."""
    from tokenizers import Tokenizer, models, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY - 256, limit_alphabet=110, show_progress=False
    )
    inner = _spaces_marked(Tokenizer(models.BPE()), kind)
    inner.train_from_iterator(_texts(), trainer)
    model = json.loads(inner.to_str())["model"]
    names = ["<unk>", *_BYTES, *model["vocab"]]
    merges = [tuple(pair) for pair in model["merges"]]
    made = models.BPE(
        {name: number for number, name in enumerate(names)}, merges,
        unk_token="<unk>", byte_fallback=True, fuse_unk=True,
    )  # fmt: skip
    return _spaces_marked(Tokenizer(made), kind)


def _unigram(kind: str) -> Any:
    from tokenizers import Tokenizer, models, trainers

    trainer = trainers.UnigramTrainer(
        vocab_size=_VOCABULARY - 200, unk_token="<unk>", special_tokens=["<unk>"],
        show_progress=False,
    )  # fmt: skip
    inner = _spaces_marked(Tokenizer(models.Unigram()), kind)
    inner.train_from_iterator(_texts(), trainer)
    known = [tuple(pair) for pair in json.loads(inner.to_str())["model"]["vocab"]]
    pieces = [*known, *((name, -20.0) for name in _BYTES)]
    made = models.Unigram(pieces, unk_id=0, byte_fallback=True)
    return _spaces_marked(Tokenizer(made), kind)


def _wordpiece(kind: str) -> Any:
    """Make one in the manner of BERT: lower case, no white space, every letter known."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    inner = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=100_000))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=False)
    letters = [chr(number) for number in range(33, 127)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=_VOCABULARY, special_tokens=["<unk>"], limit_alphabet=120,
        initial_alphabet=letters, show_progress=False,
    )  # fmt: skip
    # Every letter in the middle of a word, too.
    inner.train_from_iterator([*_texts(), *("a" + 2 * letter for letter in letters)], trainer)
    return inner
