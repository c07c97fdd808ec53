"""Rendered text to token ids and loss masks, many rows in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.chat.template import Rendered
from pipeline.errors import CorpusError

__all__ = ["DocumentEnds", "Tokens", "document_ends", "require_offsets", "tokenise"]


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


def require_offsets(tokenizer: Any) -> None:
    """Reject tokenizers without character offsets of tokens.

    Raises:
        CorpusError: the tokenizer is not one of the `tokenizers` library.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise CorpusError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets of its tokens",
            expected="a fast tokenizer (one with a tokenizer.json)",
            do="convert it with AutoTokenizer.from_pretrained(..., use_fast=True) and save it",
        )


def document_ends(tokenizer: Any, *, add_bos: bool, add_eos: bool) -> DocumentEnds:
    """Choose BOS and EOS; BOS only if the tokenizer itself begins text with it."""
    bos = tokenizer.bos_token_id
    if not add_bos or bos is None or list(tokenizer("a")["input_ids"])[:1] != [bos]:
        bos = None
    return DocumentEnds(bos=bos, eos=tokenizer.eos_token_id if add_eos else None)


def tokenise(rows: Sequence[Rendered | str], *, tokenizer: Any, ends: DocumentEnds) -> list[Tokens]:
    """Tokenise chats (`Rendered`) and documents (`str`) in one call, in order.

    A chat's text already contains all special tokens of its template, so none is added.
    """
    if not rows:
        return []
    texts = [row if isinstance(row, str) else row.text for row in rows]
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    result = []
    for row, ids, offsets in zip(
        rows, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        tokens = np.asarray(ids, dtype=np.int32)
        if isinstance(row, str):
            tokens = _with_ends(tokens, ends)
            loss_mask = np.ones(tokens.shape, dtype=np.bool_)
        else:
            loss_mask = _mask(row.spans, np.asarray(offsets, dtype=np.int64).reshape(-1, 2))
        result.append(Tokens(tokens, loss_mask))
    return result


def _with_ends(tokens: NDArray[np.int32], ends: DocumentEnds) -> NDArray[np.int32]:
    if not len(tokens):
        return tokens
    before = [ends.bos] if ends.bos is not None and tokens[0] != ends.bos else []
    after = [ends.eos] if ends.eos is not None and tokens[-1] != ends.eos else []
    return np.concatenate([before, tokens, after]).astype(np.int32)


def _mask(spans: list[tuple[int, int]], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the tokens that begin inside a span.

    A token that begins in the header and extends into the answer belongs to the header: after the
    prompt alone the model never predicts it.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    loss_mask = np.zeros(len(offsets), dtype=np.bool_)
    for begin, stop in spans:
        loss_mask |= (starts >= begin) & (starts < stop) & (ends > starts)
    return loss_mask
