"""The precision a model runs in, for teacher and student alike; imports no torch."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from pipeline.config import Settings, option

__all__ = ["PrecisionSettings"]


class PrecisionSettings(Settings):
    """bfloat16, float16, or float32 when neither is on."""

    bf16: bool | None = option(
        None, "run in bfloat16 (none: yes on a GPU, float32 on a CPU)", flag="bf16"
    )
    fp16: bool = option(
        False, "run in float16 (training needs a GPU and scales the loss)", flag="fp16"
    )

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both on, expected at most one")
        return self

    def dtype(self, *, on_gpu: bool) -> str:
        """Return `float32`, `bfloat16` or `float16`."""
        if self.fp16:
            return "float16"
        use_bf16 = on_gpu if self.bf16 is None else self.bf16
        return "bfloat16" if use_bf16 else "float32"
