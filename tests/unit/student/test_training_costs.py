"""The memory of training: what ZeRO divides, what is offloaded, what checkpointing leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.loss.settings import LossSettings
from pipeline.models.shape import ModelShape
from pipeline.student.costs import model_flops, training_flops, training_memory
from pipeline.student.settings.student import StudentSettings
from pipeline.student.settings.train import TrainSettings

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
    assert sizes[False].activations == 4096 * 1000 * 10 * 2 * 48
    assert sizes[True].activations == 4096 * 1000 * 2 * (10 + 48)
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


def test_the_models_own_operations() -> None:
    """6 a parameter and token, the head at supervised tokens, attention over each sequence."""
    layers = COUNT - 5000 * 1000
    found = model_flops(SHAPE, StudentSettings(), lengths=[30, 10], loss_tokens=7)
    attention = 6 * 10 * 1000 * (30 * 30 + 10 * 10)
    assert found == 6 * layers * 40 + 6 * 5000 * 1000 * 7 + attention
    again = StudentSettings(gradient_checkpointing=True)
    assert model_flops(SHAPE, again, lengths=[30, 10], loss_tokens=7) == found
    adapters = StudentSettings.model_validate({"lora": {"rank": 8}})
    assert model_flops(SHAPE, adapters, lengths=[], loss_tokens=1) == 4 * 5000 * 1000


def test_attention_is_counted_as_far_as_it_looks() -> None:
    """Two layers of windows, one without attention, the rest full; checkpointing computes again."""
    windows = (4, 1000, 0, *[None] * 7)
    sliding = replace(SHAPE, windows=windows)
    plain = model_flops(SHAPE, StudentSettings(), lengths=[30], loss_tokens=7)
    found = model_flops(sliding, StudentSettings(), lengths=[30], loss_tokens=7)
    pairs = 4 * 30 - 4 * 4 / 2
    assert plain - found == 3 * 4 * 1000 * (2 * 450 - pairs)
    weights = training_flops(sliding, StudentSettings(), tokens=60)
    attention = 2 * 4 * 1000 * (8 * 450 + pairs)  # two sequences, forward
    for again in (False, True):
        student = StudentSettings(gradient_checkpointing=again)
        more = training_flops(sliding, student, tokens=60, mean_length=30)
        assert more == weights * (8 / 6 if again else 1) + (4 if again else 3) * attention


@pytest.mark.parametrize(("dtype", "element", "learns"), [("bfloat16", 2, 6), ("float32", 4, 4)])
def test_the_head_on_a_gpu_takes_what_its_chunks_and_sums_take(
    dtype: str, element: int, learns: int
) -> None:
    def head(memory: int, **student: Any) -> int:
        return training_memory(
            SHAPE, StudentSettings.model_validate(student), TrainSettings(), LossSettings(),
            tokens=4096, world_size=1, dtype=dtype, device_bytes=memory,
        ).head  # fmt: skip

    wide = 5056  # 5,000 up to the next multiple of 64
    assert head(80 << 30) == 2 * 4096 * wide * element + learns * 5000 * 1000
    assert head(80 << 30, lora={"rank": 8}) == 2 * 4096 * wide * element
    small = (1 << 30) // 32 // (wide * element) // 128 * 128
    assert head(1 << 30) == 2 * small * wide * element + learns * 5000 * 1000
