"""The entry point through which vLLM's processes learn of the capture model; light to import."""

from __future__ import annotations

from pipeline.teacher.engines.vllm_variable import is_set

__all__ = ["register"]


def register() -> None:
    """Register the capture model where this project asked for it; nothing otherwise."""
    if is_set():
        from pipeline.teacher.engines.vllm_pooler import register_capture

        register_capture()
