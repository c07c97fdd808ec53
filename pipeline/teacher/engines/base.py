"""The seam to whatever runs the teacher: sequences in, finished columns out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.sampling.noise import sample_key
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme

__all__ = ["CaptureRequest", "Engine", "EngineInfo", "engine_info", "open_engine"]


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """One sequence and the rows whose distribution is wanted."""

    sample_id: str
    input_ids_L: NDArray[np.int32]
    rows_N: NDArray[np.int64]
    """Positions t whose distribution over token t + 1 is captured; ascending, below L - 1."""

    @property
    def key(self) -> int:
        """Key of the sample's random numbers."""
        return sample_key(self.sample_id)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The part of the cache's identity that the engine makes."""

    engine: str
    engine_version: str
    dtype: str
    device: str


class Engine(Protocol):
    """A loaded teacher."""

    vocab_size: int

    def capture(
        self,
        requests: Sequence[CaptureRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Return `float32 [N, C]` for each request, in order; see `sparsify` for the columns.

        Args:
            requests: the sequences.
            on_tokens: told of tokens as they are done; their sum is that of all requests.
        """
        ...

    def close(self) -> None:
        """Free the device."""
        ...


def engine_info(settings: TeacherSettings) -> EngineInfo:
    """Return name, version, dtype and device without loading the teacher.

    Raises:
        ConfigError: the engine or what it needs is not installed.
    """
    if settings.engine == "vllm":
        from pipeline.teacher.engines.vllm import vllm_info

        return vllm_info(settings)
    from pipeline.teacher.engines.transformers import transformers_info

    return transformers_info(settings)


def open_engine(
    settings: TeacherSettings,
    capture: CaptureSettings,
    *,
    folder: Path,
    scheme: SparseScheme,
    max_length: int,
) -> Engine:
    """Load the teacher from `folder` for sequences of at most `max_length` tokens."""
    if settings.engine == "vllm":
        from pipeline.teacher.engines.vllm import VllmEngine

        return VllmEngine(settings, capture, folder=folder, scheme=scheme, max_length=max_length)
    from pipeline.teacher.engines.transformers import TransformersEngine

    return TransformersEngine(settings, capture, folder=folder, scheme=scheme)
