"""Forecasts: what fits a device, what helps where it does not, the longest pack, the time."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.loss.settings import LossSettings
from pipeline.models.shape import ModelShape, model_shape
from pipeline.observe.devices import BANDWIDTH_SHARE, DEVICES, FULL_SHARE, TRAINING_SHARE
from pipeline.student.forecast import Forecast, forecast_lines, forecast_training
from pipeline.student.settings.student import StudentSettings
from pipeline.student.settings.train import TrainSettings
from tests.recipes.plan import MODELS

GIB = 1 << 30
H100 = DEVICES["h100"]
PACK = 8192


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return model_shape(json.loads((MODELS / "Qwen3-8B.json").read_text()))


def _settings(
    *, checkpointing: bool = True, **train: Any
) -> tuple[StudentSettings, TrainSettings, LossSettings]:
    return (
        StudentSettings(gradient_checkpointing=checkpointing),
        TrainSettings(bf16=True, gradient_accumulation_steps=1, **train),
        LossSettings(),
    )


def _forecast(shape: ModelShape, settings: Any, devices: int) -> Forecast:
    return forecast_training(shape, *settings, H100, devices=devices, step_tokens=PACK, tokens=1e8)


def test_the_state_of_eight_billion_parameters(shape: ModelShape) -> None:
    """2 bytes a weight and a gradient, 12 of the optimiser, by ZeRO 3 over eight devices."""
    whole = 16 * shape.parameters
    assert _forecast(shape, _settings(zero_stage=3), 8).memory.state == pytest.approx(whole / 8)
    one = _forecast(shape, _settings(zero_stage=3), 1)
    assert one.memory.state == pytest.approx(whole)
    assert whole > 79 * GIB
    assert not one.fits
    assert one.longest_pack == 0


def test_the_longest_pack_is_the_longest_that_fits(shape: ModelShape) -> None:
    settings = _settings(zero_stage=3)
    longest = _forecast(shape, settings, 8).longest_pack

    def fits(tokens: int) -> bool:
        return forecast_training(
            shape, *settings, H100, devices=8, step_tokens=tokens, tokens=1e8
        ).fits

    assert longest > PACK
    assert fits(longest - 64)
    assert not fits(longest + 64)


def test_the_time_is_that_of_the_operations(shape: ModelShape) -> None:
    """Eight operations a parameter and token: the forward pass runs twice with checkpointing."""
    found = _forecast(shape, _settings(zero_stage=3), 8).seconds
    flops = 8 * shape.used_parameters * 1e8
    assert found == pytest.approx(flops / (TRAINING_SHARE * H100.flops * 8))


def test_the_time_has_attention_and_updates_in_it(shape: ModelShape) -> None:
    """One sequence of 256k tokens, 4.7 times the weights' operations; state read and written."""
    settings = _settings(zero_stage=3)
    sizes = {"devices": 8, "step_tokens": PACK, "tokens": 1e8}
    plain = forecast_training(shape, *settings, H100, **sizes)
    long = forecast_training(shape, *settings, H100, **sizes, mean_length=1 << 18)
    assert long.seconds / plain.seconds == pytest.approx(1 + 4.7, rel=0.1)
    many = forecast_training(shape, *settings, H100, **sizes, steps=1000)
    bytes_of_a_step = 2 * plain.memory.state
    rate = BANDWIDTH_SHARE * H100.bytes_per_s
    assert many.seconds - plain.seconds == pytest.approx(1000 * bytes_of_a_step / rate)


@pytest.mark.parametrize(
    ("checkpointing", "zero_stage", "devices", "said"),
    [
        (False, 3, 8, "does not fit --student.gradient_checkpointing true fits ("),
        (True, 1, 2, "--train.zero_stage 2 or more divides the state further; "),
        (True, 3, 8, ""),
    ],
)
def test_what_does_not_fit_names_what_helps(
    shape: ModelShape, checkpointing: bool, zero_stage: int, devices: int, said: str
) -> None:
    settings = _settings(checkpointing=checkpointing, zero_stage=zero_stage)
    forecast = _forecast(shape, settings, devices)
    lines = forecast_lines(forecast, H100, devices=devices, zero_stage=zero_stage)
    advice = [line for line in lines if line.startswith("does not fit")]
    assert forecast.limit == int(FULL_SHARE * H100.memory_gib * GIB)
    assert forecast.fits == (not advice)
    assert said in "".join(advice)
    assert bool(said) == bool(advice)


@pytest.mark.parametrize(
    ("slices", "saving", "thousands"),
    [(1, (), 85), (1, ("tiled_mlp",), 109), (8, (), 631), (8, ("tiled_mlp",), 795)],
)
def test_long_packs(
    shape: ModelShape, slices: int, saving: tuple[str, ...], thousands: int
) -> None:
    """The table of pipeline/decisions/long-packs.md, ZeRO 3 on eight devices."""
    options = dict.fromkeys(saving, True)
    settings = _settings(zero_stage=3, sequence_parallel_size=slices, **options)
    found = forecast_training(
        shape, *settings, H100, devices=8, step_tokens=(1 << 18) // slices, tokens=1e8
    )
    assert found.longest_pack // 1000 == thousands
    assert found.fits == (slices == 8), "256k tokens"
    lines = "\n".join(forecast_lines(found, H100, devices=8, zero_stage=3))
    assert ("tokens a pass, shared by 8 processes, with" in lines) == (slices == 8)
    assert ("--train.sequence_parallel_size 8 divides the activations" in lines) == (slices == 1)
