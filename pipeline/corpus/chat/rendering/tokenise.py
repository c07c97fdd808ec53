"""Rendered text to token ids and loss masks, many rows in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.chat.rendering.encoder import Encoded, TextEncoder
from pipeline.corpus.chat.rendering.render import Rendered

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
    documents = encoder.encode_ids([row for row in rows if isinstance(row, str)])
    chats = encoder.encode([row.text for row in rows if isinstance(row, Rendered)])
    ids, encoded = iter(documents), iter(chats)
    return [
        _document(next(ids), ends) if isinstance(row, str) else _chat(row, next(encoded), encoder)
        for row in rows
    ]


def _document(ids_L: NDArray[np.int32], ends: DocumentEnds) -> Tokens:
    tokens = _with_ends(ids_L, ends)
    return Tokens(tokens, np.ones(tokens.shape, dtype=np.bool_))


def _with_ends(tokens: NDArray[np.int32], ends: DocumentEnds) -> NDArray[np.int32]:
    if not len(tokens):
        return tokens
    before = [ends.bos] if ends.bos is not None and tokens[0] != ends.bos else []
    after = [ends.eos] if ends.eos is not None and tokens[-1] != ends.eos else []
    return np.concatenate([before, tokens, after]).astype(np.int32)


def _chat(row: Rendered, encoded: Encoded, encoder: TextEncoder) -> Tokens:
    """Mark the tokens inside the spans; a token that crosses a span's end is divided there.

    Generation begins with the prompt's own tokens, so a token across the prompt's end (a space of
    the prompt with the first word of the answer) does not occur there. A special token that takes
    the white space behind it, at the end of a turn, is whole: no chat has that white space apart.
    """
    places = {at: encoded.token_at(at) for span in row.spans for at in span}
    begins = {begin for begin, _ in row.spans}
    crossed = sorted(
        at
        for at, (token, is_crossed) in places.items()
        if is_crossed
        and (at in begins or int(encoded.ids_L[token - 1]) not in encoder.taking_space)
    )
    if crossed:
        encoded = encoder.encode_parts(row.text, crossed)
        places = {at: encoded.token_at(at) for at in places}
    loss_mask = np.zeros(len(encoded.ids_L), dtype=np.bool_)
    for begin, stop in row.spans:
        loss_mask[places[begin][0] : places[stop][0]] = True
    return Tokens(encoded.ids_L, loss_mask)
