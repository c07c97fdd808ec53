"""Engines by name: what they are, and the one that is loaded."""

from __future__ import annotations

from pathlib import Path

from pipeline.teacher.engines.base import Engine, EngineInfo
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme

__all__ = ["engine_info", "open_engine"]


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
