"""Identities of rows and samples, and the rule that holds rows out."""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass, field
from typing import Any

from pipeline.corpus.sample import SplitName

__all__ = ["HeldoutRule", "SmallCorpus", "prompt_id", "response_id", "response_seed", "sample_id"]


def sample_id(source: str, key: str, part: int) -> str:
    """Return 32 hexadecimal digits for one part of one row of a source.

    It depends on neither the seed, the settings nor the text: the same row of the same source has
    the same id in every cache; all else is part of the corpus's identity.
    """
    return hashlib.blake2b(_name(source, key, str(part)), digest_size=16).hexdigest()


def prompt_id(source: str, key: str) -> str:
    """Return 32 hexadecimal digits for the prompt that one row of a source gives."""
    return _digest("prompt", source, key)


def response_id(prompt: str, number: int) -> str:
    """Return the sample id of a prompt's response `number` (from 0); no row's id equals it."""
    return _digest("response", prompt, str(number))


def response_seed(seed: int, response: str) -> int:
    """Return the seed, 63 bits, with which one response is sampled.

    It depends only on the run's seed and the response's id: not on the batch, the worker, the
    order, or the number of other prompts and responses.
    """
    return int(_digest("seed", str(seed), response)[:16], 16) >> 1


def _digest(purpose: str, *parts: str) -> str:
    name = _name(*parts)
    return hashlib.blake2b(name, digest_size=16, person=purpose.encode()).hexdigest()


AT_LEAST = 4
"""Rows held out of a corpus that is too small for its fraction, but never over a quarter of it."""


@dataclass(slots=True)
class HeldoutRule:
    """Decides for each row in source order, without knowing how many rows follow.

    A row is selected when the 64-bit hash of (seed, source, key) is below `fraction` * 2^64. With
    `at_most`, only that many of the selected rows are held out, the first ones. A decision depends
    only on that row and those before it, so reading more rows changes none.
    """

    seed: int
    source: str
    fraction: float
    at_most: int | None
    taken: int = field(default=0, init=False)

    def split_of(self, key: str) -> SplitName:
        """Return the split of the next row."""
        if self.at_most is not None and self.taken >= self.at_most:
            return "train"
        if self.hash_of(key) >= self.fraction * 2.0**64:
            return "train"
        self.taken += 1
        return "heldout"

    def hash_of(self, key: str) -> int:
        """Return the 64-bit hash of a row that decides about it."""
        name = _name(str(self.seed), self.source, key)
        return int.from_bytes(hashlib.blake2b(name, digest_size=8, person=b"heldout").digest())

    def least(self, rows: int) -> int:
        """Return how many of `rows` usable rows are held out at least, if any are wanted."""
        if self.fraction == 0 or self.at_most == 0 or rows < 2:
            return 0
        few = min(AT_LEAST, max(1, rows // 4))
        return few if self.at_most is None else min(few, self.at_most)

    def identity(self) -> dict[str, Any]:
        """Describe the rule for the manifest."""
        return {
            "rule": "blake2b64(seed, source, key) < fraction * 2^64",
            "fraction": self.fraction,
            "at_most": self.at_most,
            "at_least": f"the {AT_LEAST} smallest, or a quarter of the rows",
        }


@dataclass(slots=True)
class SmallCorpus:
    """Holds rows out by the order of their hashes where the fraction picks too few.

    It matters only for small corpora, where a share of 2 % may be no row at all. A row that is held
    out by this may return to the training part when more rows are read.
    """

    rule: HeldoutRule
    rows: int = 0
    """Usable rows."""
    heldout: int = 0
    _smallest: list[tuple[int, int]] = field(default_factory=list)
    """A heap of (minus the hash, minus the row's number) of training rows."""

    def add(self, key: str, index: int, split: SplitName) -> None:
        """Note a usable row; call it once a row."""
        self.rows += 1
        if split == "heldout":
            self.heldout += 1
        elif self.rule.fraction and self.heldout < AT_LEAST:
            heapq.heappush(self._smallest, (-self.rule.hash_of(key), -index))
            if len(self._smallest) > AT_LEAST:
                heapq.heappop(self._smallest)

    def moved(self) -> frozenset[int]:
        """Return the numbers of the training rows that are held out after all."""
        missing = max(0, self.rule.least(self.rows) - self.heldout)
        by_hash = sorted(self._smallest, reverse=True)
        return frozenset(-index for _, index in by_hash[:missing])


def _name(*parts: str) -> bytes:
    # Lengths distinguish ("a", "bc") from ("ab", "c").
    return b"".join(b"%d:%s" % (len(raw), raw) for raw in (part.encode() for part in parts))
