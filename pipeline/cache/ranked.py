"""Codec "ranked" of format version 2: what describes it, and the byte columns it makes.

Ids are replaced by their rank in an order of the vocabulary that lists frequent tokens first, and
written as gaps between ascending ranks (`kernels.py`); numbers lie on `grid.py`'s grids. Each kind
of byte is a Parquet column of its own, so that zstd's entropy coder sees one distribution at a
time and readers take what they need. FORMAT.md is normative.

Legend: S rows, N counted positions of all of them, E entries, G temperatures, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.cache.grid import Grids
from pipeline.cache.law import SamplingLaw
from pipeline.errors import CacheError

__all__ = [
    "COLUMNS",
    "MAX_VOCAB_SIZE",
    "Blobs",
    "RankedSpec",
    "rank_order",
]

MAX_VOCAB_SIZE = 1 << 18
COLUMNS = (
    "counts", "certain_ids", "certain_bits", "certain_values", "drawn_ids", "drawn_bits",
    "drawn_values", "gold", "log_z", "entropy", "tail",
)  # fmt: skip
_U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Blobs:
    """One byte column of S rows: row s is `data[starts_S[s] : starts_S[s + 1]]`."""

    data: _U8
    starts: NDArray[np.int64]
    """S + 1 offsets."""

    @property
    def lengths_S(self) -> NDArray[np.int64]:
        """Bytes of each row."""
        return np.diff(self.starts)


@dataclass(frozen=True, slots=True)
class RankedSpec:
    """Everything a reader needs to decode; stored in every shard and in the manifest."""

    vocab_size: int
    """Rows of the teacher's head; ids are below."""
    law: SamplingLaw | None = None
    """How entries that are not certain were drawn; None: all are certain, gold has no entry."""
    order_V: NDArray[np.int32] | None = field(default=None, compare=False)
    """The token of each rank; None: rank and id are the same."""
    grids: Grids = field(default_factory=Grids)
    name: str = "ranked"

    def __post_init__(self) -> None:
        """Refuse a vocabulary whose ids do not fit.

        Raises:
            CacheError: more than 2^18 tokens.
        """
        if not 1 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise CacheError(
                f"a vocabulary of {self.vocab_size} tokens", expected=f"1 to {MAX_VOCAB_SIZE}"
            )

    @property
    def rank_V(self) -> NDArray[np.int32] | None:
        """The rank of each token."""
        if self.order_V is None:
            return None
        rank_V = np.empty(len(self.order_V), np.int32)
        rank_V[self.order_V] = np.arange(len(self.order_V), dtype=np.int32)
        return rank_V

    def ranks_file(self) -> bytes | None:
        """Return what `_meta/ranks.bin` holds before compression, int32 [V]; None: no file."""
        return None if self.order_V is None else self.order_V.astype("<i4").tobytes()

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; the order itself is a file of its own, named by its checksum."""
        ranks = self.ranks_file()
        return {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "law": None if self.law is None else self.law.to_json(),
            "grids": self.grids.to_json(),
            "ranks_xxh3_128": None if ranks is None else xxhash.xxh3_128_hexdigest(ranks),
        }

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], order_V: NDArray[np.int32] | None = None
    ) -> RankedSpec:
        """Read the JSON form.

        Raises:
            CacheError: values it cannot have, or an order that is not the one named.
        """
        try:
            law = data["law"]
            spec = cls(
                vocab_size=int(data["vocab_size"]),
                law=None
                if law is None
                else SamplingLaw(
                    tuple(float(t) for t in law["temperatures"]),
                    tuple(float(t) for t in law["taus"]),
                ),
                order_V=order_V,
                grids=Grids(**{name: float(value) for name, value in data["grids"].items()}),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CacheError(f"the cache's codec cannot be read ({error})") from None
        if not all(0 < value <= 1 for value in spec.grids.to_json().values()):
            raise CacheError(
                f"the codec's grids are {spec.grids.to_json()}", expected="steps in (0, 1]"
            )
        if spec.to_json()["ranks_xxh3_128"] != data.get("ranks_xxh3_128"):
            raise CacheError("the order of the vocabulary is not the one the codec names")
        if order_V is not None and not _is_permutation(order_V, spec.vocab_size):
            raise CacheError("the order of the vocabulary is no permutation of it")
        return spec


def rank_order(counts_V: NDArray[np.integer]) -> NDArray[np.int32]:
    """Return the tokens by falling count, equal ones by id."""
    return np.argsort(-np.asarray(counts_V, np.int64), kind="stable").astype(np.int32)


def _is_permutation(order_V: NDArray[np.int32], vocab_size: int) -> bool:
    return len(order_V) == vocab_size and bool(
        (np.bincount(np.clip(order_V, 0, vocab_size - 1), minlength=vocab_size) == 1).all()
    )
