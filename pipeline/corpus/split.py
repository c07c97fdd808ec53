"""Identities of rows and samples, and the rule that holds rows out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from pipeline.corpus.sample import SplitName

__all__ = ["HeldoutRule", "prompt_id", "response_id", "response_seed", "sample_id"]


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
        name = _name(str(self.seed), self.source, key)
        value = int.from_bytes(hashlib.blake2b(name, digest_size=8, person=b"heldout").digest())
        if value >= self.fraction * 2.0**64:
            return "train"
        self.taken += 1
        return "heldout"

    def identity(self) -> dict[str, Any]:
        """Describe the rule for the manifest."""
        return {
            "rule": "blake2b64(seed, source, key) < fraction * 2^64",
            "fraction": self.fraction,
            "at_most": self.at_most,
        }


def _name(*parts: str) -> bytes:
    # Lengths distinguish ("a", "bc") from ("ab", "c").
    return b"".join(b"%d:%s" % (len(raw), raw) for raw in (part.encode() for part in parts))
