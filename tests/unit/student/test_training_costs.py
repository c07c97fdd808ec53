"""The memory of training: what ZeRO divides, what is offloaded, what checkpointing leaves."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.loss.settings import LossSettings
from pipeline.models.shape import ModelShape
from pipeline.student.costs import training_flops, training_memory
from pipeline.student.settings import StudentSettings
from pipeline.student.train_settings import TrainSettings

SHAPE = ModelShape(
    hidden=1000, layers=10, vocab_size=5000, inner=4000, heads=10, kv_heads=10, head_dim=100,
    tied=True,
)  # fmt: skip
COUNT = 10 * (4 * 1000 * 1000 + 3 * 1000 * 4000) + 5000 * 1000


def _state(dtype: str = "bfloat16", processes: int = 8, **train: Any) -> float:
    memory = training_memory(
        SHAPE, StudentSettings(), TrainSettings(**train), LossSettings(),
        tokens=100, world_size=processes, dtype=dtype,
    )  # fmt: skip
    return memory.state / COUNT


def test_what_zero_divides() -> None:
    assert SHAPE.parameters == COUNT
    assert _state("float32", zero_stage=0) == pytest.approx(16)
    assert _state("float32", 1, zero_stage=2) == pytest.approx(16)
    one = {"gradient_accumulation_steps": 1}
    for stage in (0, 1):  # 16-bit weights have no stage 0
        assert _state(zero_stage=stage, **one) == pytest.approx(2 + 2 + 12 / 8)
    assert _state(zero_stage=2, **one) == _state(**one) == pytest.approx(2 + (2 + 12) / 8)
    assert _state(zero_stage=3, **one) == pytest.approx(16 / 8)
    assert _state(zero_stage=2, offload_optimizer=True, **one) == pytest.approx(2 + 2 / 8)
    assert _state(offload_parameters=True, **one) == pytest.approx((2 + 12) / 8)


def test_sums_in_float32() -> None:
    assert _state() == _state(zero_stage=1) == pytest.approx(2 + 2 + 4 + 12 / 8)
    assert _state(zero_stage=2) == pytest.approx(2 + (4 + 12) / 8)
    assert _state(zero_stage=2, accumulate_float32=False) == pytest.approx(2 + (2 + 12) / 8)


def test_checkpointing_keeps_the_input_of_each_layer() -> None:
    sizes = {
        checkpointing: training_memory(
            SHAPE, StudentSettings(gradient_checkpointing=checkpointing), TrainSettings(),
            LossSettings(chunk_rows=100), tokens=4096, world_size=1, dtype="bfloat16",
        )
        for checkpointing in (False, True)
    }  # fmt: skip
    assert sizes[False].activations == 4096 * 1000 * 10 * 2 * 40
    assert sizes[True].activations == 4096 * 1000 * 2 * (10 + 40)
    assert sizes[True].head == 3 * 4 * 100 * 5000


def test_adapters_and_frozen_parts_have_no_state() -> None:
    adapters = StudentSettings.model_validate({"lora": {"rank": 8}})
    memory = training_memory(
        SHAPE, adapters, TrainSettings(gradient_accumulation_steps=1), LossSettings(),
        tokens=100, world_size=1, dtype="bfloat16",
    )  # fmt: skip
    assert memory.state / COUNT == pytest.approx(2 + 16 / 16)
    plain = training_flops(SHAPE, StudentSettings(), tokens=10)
    assert plain == 6 * COUNT * 10
    assert training_flops(SHAPE, adapters, tokens=10) == 4 * COUNT * 10
    again = StudentSettings(gradient_checkpointing=True)
    assert training_flops(SHAPE, again, tokens=10) == 8 * COUNT * 10
