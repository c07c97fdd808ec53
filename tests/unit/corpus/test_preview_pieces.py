"""Tokens as pieces of text: together the text of all ids, each as small as its text allows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.chat.rendering.encoder import TextEncoder
from pipeline.corpus.preview.pieces import PieceMaker
from pipeline.corpus.preview.record import Piece
from pipeline.corpus.preview.visible import visible_texts
from tests.conformance.templates import TEMPLATES
from tests.conformance.vocabularies import KINDS, tokenizer_of

TEXTS = (
    "Hello there.\n\n  Two  spaces, a tab\tand an end ",
    "Grüße, naïve café — 中文字符 и кириллица 🙂👩\u200d👩\u200d👧 \U0001d54f",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nYes.<|im_end|>\n",
    "a replacement \ufffd of its own, \ufffd\ufffd and on",
    "",
    " ",
)


def _pieces(tokenizer: Any, ids: Any) -> tuple[Piece, ...]:
    ids_L = np.asarray(ids, np.int32)
    return PieceMaker(tokenizer).pieces(ids_L, np.zeros(ids_L.shape, np.bool_))


def _whole(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    ))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_are_the_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind, TEMPLATES[0])
    for text in TEXTS:
        (encoded,) = TextEncoder(tokenizer).encode([text])
        pieces = _pieces(tokenizer, encoded.ids_L)
        assert "".join(piece.text for piece in pieces) == _whole(tokenizer, encoded.ids_L), text
        assert [token for piece in pieces for token in piece.ids] == encoded.ids_L.tolist()
        # Only tokens of one character share a piece.
        assert all(len(piece.ids) == 1 or len(piece.text) <= 2 for piece in pieces), pieces


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text(text: str) -> None:
    for kind in ("bytes", "metaspace_first", "llama_legacy"):
        tokenizer = tokenizer_of(kind, TEMPLATES[0])
        (encoded,) = TextEncoder(tokenizer).encode([text])
        pieces = _pieces(tokenizer, encoded.ids_L)
        assert "".join(piece.text for piece in pieces) == _whole(tokenizer, encoded.ids_L)


def test_a_row_that_is_cut_inside_a_character() -> None:
    tokenizer = tokenizer_of("bytes", TEMPLATES[0])
    (encoded,) = TextEncoder(tokenizer).encode(["ok 🙂"])
    for length in range(1, len(encoded.ids_L) + 1):
        ids = encoded.ids_L[:length]
        pieces = _pieces(tokenizer, ids)
        assert "".join(piece.text for piece in pieces) == _whole(tokenizer, ids)
    assert pieces[-1].text == "🙂"
    assert len(pieces[-1].ids) > 1


def test_special_tokens_and_the_mask_keep_their_tokens() -> None:
    tokenizer = tokenizer_of("bytes", TEMPLATES[0])
    (encoded,) = TextEncoder(tokenizer).encode(["<|im_start|>user\nHi<|im_end|>"])
    mask = np.zeros(encoded.ids_L.shape, np.bool_)
    mask[-1] = True
    pieces = PieceMaker(tokenizer).pieces(encoded.ids_L, mask)
    assert [piece.text for piece in pieces if piece.special] == ["<|im_start|>", "<|im_end|>"]
    assert [piece.text for piece in pieces if piece.supervised] == ["<|im_end|>"]


def test_what_cannot_be_seen_is_shown() -> None:
    def piece(text: str, *, supervised: bool = False, special: bool = False) -> Piece:
        return Piece(text, (1,), supervised, special)

    shown = visible_texts(
        [piece("a b"), piece("  c "), piece("<|x|>", special=True), piece("\n\t\r"),
         piece(" d", supervised=True), piece("\x1b[31m\u202e")]
    )  # fmt: skip
    assert shown == [
        "a b", "··c·", "<|x|>", "↵\n→␍", "·d", "⟨U+001B⟩[31m⟨U+202E⟩",
    ]  # fmt: skip
