"""Token ids as pieces of text: one token each where it has a text, more where they share it.

A character may be several tokens (bytes of an emoji), and a token's text may depend on the tokens
before it (the space that SentencePiece drops at a beginning). So a piece is what decoding gains by
its tokens, after those of the piece before.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.preview.record import Piece

__all__ = ["PieceMaker"]

_BROKEN = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte that SentencePiece has no other token for."""
_TRIED = 8
"""Tokens that are tried as one piece."""


def _alphabet() -> dict[str, int]:
    """Return the byte of each letter in which byte-level tokens are written (as GPT-2's are)."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {chr(byte): byte for byte in printed}
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}


_ALPHABET = _alphabet()


class PieceMaker:
    """Divides the ids of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a fast tokenizer."""
        self._backend = tokenizer.backend_tokenizer
        self._added = frozenset(self._backend.get_added_tokens_decoder())

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, special tokens included."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def pieces(self, ids_L: NDArray[np.int32], mask_L: NDArray[np.bool_]) -> tuple[Piece, ...]:
        """Return the pieces, whose texts together are the text of all ids.

        Args:
            ids_L: token ids.
            mask_L: which of them are supervised.
        """
        ids = ids_L.tolist()
        return tuple(
            Piece(
                text,
                tuple(ids[begin:end]),
                bool(mask_L[begin:end].any()),
                end == begin + 1 and ids[begin] in self._added,
            )
            for begin, end, text in self._divided(ids)
        )

    def _divided(self, ids: list[int]) -> Iterator[tuple[int, int, str]]:
        context = begin = 0
        while begin < len(ids):
            before = self.text_of(ids[context:begin])
            most = min(len(ids), begin + _TRIED)
            end = next(
                (
                    end
                    for end in range(begin + 1, most + 1)
                    if self._is_whole(ids, context, end, before)
                ),
                most,
            )
            text = self.text_of(ids[context:end])
            # Where it does not go on with what was before, no context is better.
            gained = text.removeprefix(before) if text.startswith(before) else None
            yield begin, end, self.text_of(ids[begin:end]) if gained is None else gained
            context, begin = begin, end

    def _is_whole(self, ids: list[int], context: int, end: int, before: str) -> bool:
        text = self.text_of(ids[context:end])
        if not text.startswith(before):
            return False
        if not text.endswith(_BROKEN) or end == len(ids):
            return True
        following = self._bytes_of(ids[end])[:1]
        if not b"\x80" <= following < b"\xc0":
            return True  # it continues no character
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(b"".join(map(self._bytes_of, ids[context:end])))
        return not decoder.getstate()[0]

    def _bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token stands for, where it stands for bytes; else none."""
        name = self._backend.id_to_token(token) or ""
        if token in self._added:
            return b""
        if match := _BYTE.fullmatch(name):
            return bytes([int(match[1], 16)])
        return bytes(_ALPHABET[char] for char in name) if _ALPHABET.keys() >= set(name) else b""
