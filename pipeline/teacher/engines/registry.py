"""Engines by name: what they are, and the one that is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.teacher.engines.base import Engine, EngineInfo
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme

__all__ = ["check_engine", "engine_info", "open_engine", "with_head"]


def engine_info(settings: TeacherSettings) -> EngineInfo:
    """Return name, version, dtype and device without loading the teacher.

    Raises:
        ConfigError: the engine or what it needs is not installed.
    """
    if settings.engine == "vllm":
        from pipeline.teacher.engines.vllm import vllm_info

        return vllm_info(settings)
    if settings.engine == "openai":
        from pipeline.teacher.engines.endpoint.serving import endpoint_info

        return endpoint_info(settings)
    from pipeline.teacher.engines.transformers import transformers_info

    return transformers_info(settings)


def check_engine(
    settings: TeacherSettings, capture: CaptureSettings, max_length: int | None
) -> None:
    """Find out what can be found out without loading: whether servers give what will be asked.

    Raises:
        ConfigError: they do not.
        EngineStalled: one of them does not answer.
    """
    if settings.engine == "openai":
        from pipeline.teacher.engines.endpoint.serving import check_endpoint

        check_endpoint(settings, capture, max_length)


def with_head(info: EngineInfo, settings: TeacherSettings, config: Mapping[str, Any]) -> EngineInfo:
    """Return the identity with the dtype of the head.

    Args:
        info: as `engine_info` returns it.
        settings: the path of the capture, and what overrides the config.
        config: of the model, as `read_model_config` returns it.
    """
    if info.engine != "vllm":
        return replace(info, head_dtype=info.dtype)
    from pipeline.teacher.engines.vllm_head import head_dtype

    overrides = settings.engine_options.get("hf_overrides")
    return replace(info, head_dtype=head_dtype(config, info.dtype, overrides))


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
    if settings.engine == "openai":
        from pipeline.teacher.engines.endpoint.engine import EndpointEngine

        return EndpointEngine(settings, folder=folder, scheme=scheme)
    from pipeline.teacher.engines.transformers import TransformersEngine

    return TransformersEngine(settings, capture, folder=folder, scheme=scheme)
