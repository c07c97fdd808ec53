"""A tokenizer's own library, set so that tokens and characters can be aligned.

Post-processors report offsets for people: most byte-level ones trim white space off them, so that
a token of spaces has no characters at all. Without the post-processor each token has all characters
that it stands for. What a post-processor adds (BOS, EOS) is not wanted in rendered chats anyway.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorpusError

__all__ = ["Encoded", "TextEncoder"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """The L tokens of one text."""

    ids_L: NDArray[np.int32]
    starts_L: NDArray[np.int64]
    """The first character of each token."""
    stops_L: NDArray[np.int64]
    """The character after its last."""


class TextEncoder:
    """Encodes text without adding any token; its offsets divide the text."""

    def __init__(self, tokenizer: Any) -> None:
        """Copy the tokenizer's backend.

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
        self._state = json.loads(tokenizer.backend_tokenizer.to_str())
        self._state.update(post_processor=None, truncation=None, padding=None)
        self._encoder = _loaded(self._state)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode whole texts, in order."""
        return [_encoded(item) for item in self._encode(self._encoder, texts)]

    def encode_parts(self, text: str, cuts: Sequence[int]) -> Encoded:
        """Encode a text so that no token crosses one of `cuts` (characters, ascending)."""
        bounds = [0, *cuts, len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(bounds)]
        first = _encoded(self._encode(self._encoder, parts[:1])[0])
        rest = map(_encoded, self._encode(self._continuing, parts[1:]))
        placed = [
            (part.ids_L, part.starts_L + at, part.stops_L + at)
            for part, at in zip((first, *rest), bounds, strict=False)
        ]
        return Encoded(*(np.concatenate(arrays) for arrays in zip(*placed, strict=True)))

    @staticmethod
    def _encode(encoder: Any, texts: Sequence[str]) -> list[Any]:
        return list(encoder.encode_batch(list(texts), add_special_tokens=False))

    @cached_property
    def _continuing(self) -> Any:
        """The encoder for text that follows other text: it puts no space before it."""
        return _loaded(_without_prefix(self._state))


def _loaded(state: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(state))


def _encoded(item: Any) -> Encoded:
    offsets = np.asarray(item.offsets, np.int64).reshape(-1, 2)
    return Encoded(np.asarray(item.ids, np.int32), offsets[:, 0], offsets[:, 1])


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
