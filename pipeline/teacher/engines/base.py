"""The seam to whatever runs the teacher: sequences in, finished columns out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.models.resolved import ResolvedModel
from pipeline.sampling.noise import sample_key
from pipeline.teacher.settings import TeacherSettings

__all__ = ["CaptureRequest", "Engine", "EngineInfo", "Teacher"]


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """One sequence and the rows whose distribution is wanted."""

    sample_id: str
    input_ids_L: NDArray[np.int32]
    rows_N: NDArray[np.int64]
    """Positions t whose distribution over token t + 1 is captured; ascending, below L - 1."""
    requested_NK: NDArray[np.int32] | None = None
    """Ids whose log p is wanted at each of these rows, whatever the scheme keeps; -1: none."""
    split: str = "train"
    """Where the row belongs: a scheme may keep more of held-out rows."""

    @property
    def row_id(self) -> str:
        """What the row is called where it is quarantined."""
        return self.sample_id

    @property
    def key(self) -> int:
        """Key of the sample's random numbers."""
        return sample_key(self.sample_id)

    @property
    def num_requested(self) -> int:
        """K: columns that come after those of the scheme."""
        ids_NK = self.requested_NK
        return 0 if ids_NK is None or not len(ids_NK) else ids_NK.shape[1]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The part of the cache's identity that the engine makes."""

    engine: str
    engine_version: str
    dtype: str
    device: str
    head_dtype: str = ""
    """Of the product with the head; empty until the model's config is known."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A teacher that is resolved, and not loaded."""

    settings: TeacherSettings
    model: ResolvedModel
    info: EngineInfo
    tokenizer: Any
    vocab_size: int
    """Rows of the head."""
    max_length: int
    """Of a sample, tokens."""


class Engine(Protocol):
    """A loaded teacher."""

    vocab_size: int
    attention: str
    """The kernels that compute attention, by the engine's name for them."""

    def capture(
        self,
        requests: Sequence[CaptureRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Return `float32 [N, C + K]` for each request, in order.

        See `sparsify` for the columns, and `sparsify.requested` for those of K requested ids.

        Args:
            requests: the sequences.
            on_tokens: called with tokens as they are done, 0 after a step that finished no
                sequence; their sum is that of all requests.
        """
        ...

    def close(self) -> None:
        """Free the device."""
        ...
