"""The entry point through which vLLM's processes learn of the capture model; imports nothing."""

from __future__ import annotations

import os

__all__ = ["CAPTURE_PREFIX", "CAPTURE_VARIABLE", "register"]

CAPTURE_VARIABLE = "DISTILL_VLLM_CAPTURE"
CAPTURE_PREFIX = "DistillCapture"


def register() -> None:
    """Register the capture model where this project asked for it; nothing otherwise."""
    if CAPTURE_VARIABLE in os.environ:
        from pipeline.teacher.engines.vllm_pooler import register_capture

        register_capture()
