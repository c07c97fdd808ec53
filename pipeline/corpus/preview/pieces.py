"""Token ids as pieces of text: one token each where it has a text, more where they share it.

A character may be several tokens (bytes of an emoji), and a token's text may depend on the tokens
before it (the space that SentencePiece drops at a beginning). So a piece is what decoding gains by
its tokens, after those of the piece before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.preview.record import Piece

__all__ = ["PieceMaker"]

_BROKEN = "\ufffd"
_LONGEST_CHARACTER = 4
"""Bytes, and so tokens at most."""
_TRIED = 8
"""Tokens that are tried as one piece."""


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
        if not text.endswith(_BROKEN):
            return True
        # Half a character, unless what follows leaves it as it is.
        last = min(len(ids), end + _LONGEST_CHARACTER - 1)
        return all(
            self.text_of(ids[context:further]).startswith(text)
            for further in range(end + 1, last + 1)
        )
