"""Identities of rows and samples, and the rule that holds rows out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = [
    "AT_LEAST", "DecidedSplit", "HeldoutRule", "SplitRule", "prompt_id", "response_id",
    "response_seed", "sample_id",
]  # fmt: skip


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
ABOUT = 400
"""Candidates of which all are held out where no number is set; after them ever fewer: the n-th with
probability 400 / n. That makes 400 (1 + ln(n / 400)) of n: 1,000 of a corpus of 100 thousand rows,
2,200 of 2 million, 3,500 of 50 million."""


class SplitRule(Protocol):
    """Which candidates of the units of a corpus are held out."""

    @property
    def is_off(self) -> bool:
        """Whether nothing is to be held out."""
        ...

    def holds_out(self, row_hash: int, number: int) -> bool:
        """Return whether candidate `number`, in source order, is held out."""
        ...

    def least(self, rows: int) -> int:
        """Return how many of `rows` usable rows are held out at least."""
        ...


@dataclass(frozen=True, slots=True)
class DecidedSplit:
    """The candidates are what is held out: the split of their prompts has been decided before."""

    @property
    def is_off(self) -> bool:
        """Units say themselves what is held out."""
        return False

    def holds_out(self, row_hash: int, number: int) -> bool:
        """Hold all of them out."""
        return True

    def least(self, rows: int) -> int:
        """No others are held out, however few there are."""
        return 0


@dataclass(frozen=True, slots=True)
class HeldoutRule:
    """Decides about a row from its hash and the rows before it, without knowing what follows.

    A row is a candidate when the 64-bit hash of (seed, source, key) is below `fraction` * 2^64. Of
    the candidates, numbered from 0 in source order, `at_most` sets how many are held out: the first
    ones; without it the hash thins them out. Reading more rows changes no decision.
    """

    seed: int
    source: str
    fraction: float
    at_most: int | None

    @property
    def is_off(self) -> bool:
        """Whether nothing is to be held out."""
        return self.fraction == 0 or self.at_most == 0

    def hash_of(self, key: str) -> int:
        """Return the 64-bit hash of a row that decides about it."""
        name = _name(str(self.seed), self.source, key)
        return int.from_bytes(hashlib.blake2b(name, digest_size=8, person=b"heldout").digest())

    def is_candidate(self, row_hash: int) -> bool:
        """Return whether the fraction picks a row."""
        return not self.is_off and row_hash < self.fraction * 2.0**64

    def holds_out(self, row_hash: int, number: int) -> bool:
        """Return whether candidate `number` is held out."""
        if self.at_most is not None:
            return number < self.at_most
        return row_hash * (number + 1) < self.fraction * 2.0**64 * min(ABOUT, number + 1)

    def least(self, rows: int) -> int:
        """Return how many of `rows` usable rows are held out at least, if any are wanted."""
        if self.is_off or rows < 2:
            return 0
        few = min(AT_LEAST, max(1, rows // 4))
        return few if self.at_most is None else min(few, self.at_most)

    def identity(self) -> dict[str, Any]:
        """Describe the rule for the manifest."""
        return {
            "rule": "blake2b64(seed, source, key) < fraction * 2^64",
            "fraction": self.fraction,
            "at_most": self.at_most if self.at_most is not None else f"about, from {ABOUT} on",
            "at_least": f"the {AT_LEAST} smallest, or a quarter of the rows",
        }


def _name(*parts: str) -> bytes:
    # Lengths distinguish ("a", "bc") from ("ab", "c").
    return b"".join(b"%d:%s" % (len(raw), raw) for raw in (part.encode() for part in parts))
