"""The seam to whatever lets the teacher write: prompts and seeds in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.sample import WrittenTokens

__all__ = ["Generator", "WriteRequest", "Written"]


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """One response to be written."""

    response_id: str
    prompt_ids_L: NDArray[np.int32]
    seed: int
    """63 bits; with the prompt and the sampling settings it decides the draws."""

    @property
    def row_id(self) -> str:
        """What the response is called where it is quarantined."""
        return self.response_id


@dataclass(frozen=True, slots=True)
class Written:
    """One response as it was sampled."""

    token_ids_N: NDArray[np.int32]
    """At least one; the end-of-turn token included where the teacher wrote one."""
    logprobs_N: NDArray[np.float32] | None
    """Log-probs at temperature 1 over the whole vocabulary; None where they are not recorded."""
    top_ids_NK: NDArray[np.int32] | None = None
    """The K ids that the writer found likeliest at temperature 1, nothing left out, in falling
    order; None where they are not recorded."""

    @property
    def recorded(self) -> WrittenTokens | None:
        """What is recorded beside the tokens; None: nothing."""
        if self.logprobs_N is None and self.top_ids_NK is None:
            return None
        return WrittenTokens(self.logprobs_N, self.top_ids_NK)


class Generator(Protocol):
    """A loaded teacher that writes."""

    def write(
        self,
        requests: Sequence[WriteRequest],
        *,
        on_responses: Callable[[int], None] | None = None,
    ) -> list[Written]:
        """Return the response to each request, in order.

        A call with the same requests gives the same tokens; the same request in another call
        draws with the same random numbers, from logits whose last bits may differ.

        Args:
            requests: what to write, all to be scheduled together.
            on_responses: called with finished responses, 0 after a step that finished none; the
                sum is that of all requests.
        """
        ...

    def close(self) -> None:
        """Free the device, so that another engine can be opened in this process."""
        ...
