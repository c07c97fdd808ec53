"""A tokenizer's own library, set so that tokens and characters can be aligned.

Post-processors report offsets for people: most byte-level ones trim white space off them, so that
a token of spaces has no characters at all. Without the post-processor each token has all characters
that it stands for. What a post-processor adds (BOS, EOS) is not wanted in rendered chats anyway.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorpusError

__all__ = ["Encoded", "TextEncoder"]

_AT_ONCE = 1 << 20
"""Characters encoded in one call: the library takes about 120 bytes for each."""


class Encoded:
    """The L tokens of one text, and where its characters are among them."""

    def __init__(self, encodings: Sequence[Any], begins: Sequence[int] = (0,)) -> None:
        """Take what the library returns for parts of a text that begin at `begins`."""
        self._encodings, self._begins = encodings, begins
        ids = [token for encoding in encodings for token in encoding.ids]
        self.ids_L: NDArray[np.int32] = np.asarray(ids, np.int32)

    def token_at(self, character: int) -> tuple[int, bool]:
        """Return the first token that begins at a character or after it.

        Returns:
            Its number, and whether the token before it crosses the character: begins before it and
            ends after it.
        """
        number = bisect.bisect_right(self._begins, character) - 1
        before = sum(len(encoding.ids) for encoding in self._encodings[:number])
        token, crossed = _token_at(self._encodings[number], character - self._begins[number])
        return before + token, crossed


class TextEncoder:
    """Encodes text without adding any token; its offsets divide the text."""

    def __init__(self, tokenizer: Any) -> None:
        """Take the tokenizer's backend.

        Raises:
            CorpusError: the tokenizer is not one of the `tokenizers` library.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise CorpusError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets of its "
                "tokens",
                expected="a fast tokenizer (one with a tokenizer.json)",
                do="convert it with AutoTokenizer.from_pretrained(..., use_fast=True) and save it",
            )
        self._encoder = tokenizer.backend_tokenizer
        added = self._encoder.get_added_tokens_decoder()
        self._added = frozenset(added)
        self.taking_space = frozenset(token for token, how in added.items() if how.rstrip)
        """Added tokens that take the white space behind them."""

    def encode(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Encode whole texts, in order; what the library returns for them is in memory by parts."""
        for group in _groups(texts):
            yield from (Encoded([item]) for item in self._encode(group))

    def encode_ids(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Encode whole texts whose characters are of no interest; a fifth faster."""
        with _bare(self._encoder):
            return [
                np.asarray(item.ids, np.int32)
                for group in _groups(texts)
                for item in self._encoder.encode_batch_fast(group, add_special_tokens=False)
            ]

    def encode_parts(self, text: str, cuts: Sequence[int]) -> Encoded:
        """Encode a text so that no token crosses one of `cuts` (characters, ascending).

        What follows a cut continues a text, up to the next added token; all else is encoded as it
        is in the whole text.
        """
        begins, encodings = [0], self._encode([text[: cuts[0]]])
        for begin, end in itertools.pairwise((*cuts, len(text))):
            part = text[begin:end]
            (whole,) = self._encode([part])
            place = next((n for n, token in enumerate(whole.ids) if token in self._added), None)
            at = len(part) if place is None else whole.offsets[place][0]
            begins.append(begin)
            encodings += _encode(self._continuing, [part[:at]])
            if at < len(part):
                begins.append(begin + at)
                encodings += self._encode([part[at:]])
        return Encoded(encodings, begins)

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        with _bare(self._encoder):
            return _encode(self._encoder, texts)

    @cached_property
    def _continuing(self) -> Any:
        """The encoder for text that follows other text: it puts no space before it."""
        from tokenizers import Tokenizer

        state = json.loads(self._encoder.to_str())
        state.update(post_processor=None, truncation=None, padding=None)
        return Tokenizer.from_str(json.dumps(_without_prefix(state)))


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    group: list[str] = []
    length = 0
    for text in texts:
        group.append(text)
        length += len(text)
        if length >= _AT_ONCE:
            yield group
            group, length = [], 0
    if group:
        yield group


@contextmanager
def _bare(encoder: Any) -> Iterator[None]:
    """Take off a tokenizer what changes encodings afterwards; put its post-processor back.

    A copy of the tokenizer would take half a second to make, and forget the words it has met.
    """
    post_processor = encoder.post_processor
    encoder.post_processor = None
    encoder.no_truncation()
    encoder.no_padding()
    try:
        yield
    finally:
        encoder.post_processor = post_processor


def _encode(encoder: Any, texts: Sequence[str]) -> list[Any]:
    return list(encoder.encode_batch(list(texts), add_special_tokens=False))


def _token_at(encoding: Any, character: int) -> tuple[int, bool]:
    token = encoding.char_to_token(character)
    if token is None:
        # Behind the text, or a character that no token has (white space, of WordPiece). Offsets
        # as a list cost more than the encoding of a short text, so they are read only here.
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        token = int(np.searchsorted(offsets[:, 0], character, side="left"))
        return token, bool(token > 0 and offsets[token - 1, 1] > character)
    if encoding.token_to_chars(token)[0] < character:
        return token + 1, True
    # Tokens without characters (a space that the tokenizer puts before a text) begin there too.
    while token > 0 and encoding.token_to_chars(token - 1)[0] >= character:
        token -= 1
    return token, False


def _without_prefix(state: Any) -> Any:
    """Return a tokenizer's state in which nothing puts a space before a text."""
    if isinstance(state, list):
        return [_without_prefix(item) for item in state]
    if not isinstance(state, dict):
        return state
    changed = {
        key: value if key in ("model", "added_tokens") else _without_prefix(value)
        for key, value in state.items()
    }
    if changed.get("type") == "Prepend":  # a normalizer
        return {"type": "Sequence", "normalizers": []}
    if "prepend_scheme" in changed:
        changed["prepend_scheme"] = "never"
        changed.pop("add_prefix_space", None)
    elif "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    return changed
