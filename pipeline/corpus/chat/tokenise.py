"""Rendered text to token ids and loss masks, many rows in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.chat.encoder import Encoded, TextEncoder
from pipeline.corpus.chat.render import Rendered

__all__ = ["DocumentEnds", "Tokens", "document_ends", "tokenise"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """One row's tokens, of any length."""

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class DocumentEnds:
    """The special tokens around a plain document."""

    bos: int | None
    eos: int | None


def document_ends(tokenizer: Any, *, add_bos: bool, add_eos: bool) -> DocumentEnds:
    """Choose BOS and EOS; BOS only if the tokenizer itself begins text with it."""
    bos = tokenizer.bos_token_id
    if not add_bos or bos is None or list(tokenizer("a")["input_ids"])[:1] != [bos]:
        bos = None
    return DocumentEnds(bos=bos, eos=tokenizer.eos_token_id if add_eos else None)


def tokenise(
    rows: Sequence[Rendered | str], *, encoder: TextEncoder, ends: DocumentEnds
) -> list[Tokens]:
    """Tokenise chats (`Rendered`) and documents (`str`) in one call, in order.

    A chat's text already contains all special tokens of its template, so none is added.
    """
    texts = [row if isinstance(row, str) else row.text for row in rows]
    result = []
    for row, encoded in zip(rows, encoder.encode(texts), strict=True):
        if isinstance(row, str):
            tokens = _with_ends(encoded.ids_L, ends)
            loss_mask = np.ones(tokens.shape, dtype=np.bool_)
            result.append(Tokens(tokens, loss_mask))
        else:
            result.append(_supervised(row, encoded, encoder))
    return result


def _with_ends(tokens: NDArray[np.int32], ends: DocumentEnds) -> NDArray[np.int32]:
    if not len(tokens):
        return tokens
    before = [ends.bos] if ends.bos is not None and tokens[0] != ends.bos else []
    after = [ends.eos] if ends.eos is not None and tokens[-1] != ends.eos else []
    return np.concatenate([before, tokens, after]).astype(np.int32)


def _supervised(row: Rendered, encoded: Encoded, encoder: TextEncoder) -> Tokens:
    """Mark the tokens inside the spans; a token that crosses a span's end is divided there.

    Generation begins with the prompt's own tokens, so a token across the prompt's end (a space of
    the prompt with the first word of the answer) does not occur there.
    """
    if not len(encoded.ids_L):
        return Tokens(encoded.ids_L, np.zeros(0, dtype=np.bool_))
    bounds = np.unique(np.asarray(row.spans, np.int64))
    # The token at each bound: the last that begins before it. Tokens that share a character
    # (the bytes of one) begin at the same place and end after it together.
    before = np.searchsorted(encoded.starts_L, bounds, side="left") - 1
    crossed = (before >= 0) & (encoded.stops_L[before] > bounds)
    if np.any(crossed):
        encoded = encoder.encode_parts(row.text, bounds[crossed].tolist())
    loss_mask = np.zeros(len(encoded.ids_L), dtype=np.bool_)
    for begin, stop in row.spans:
        first, last = np.searchsorted(encoded.starts_L, (begin, stop), side="left")
        loss_mask[first:last] = True
    return Tokens(encoded.ids_L, loss_mask)
