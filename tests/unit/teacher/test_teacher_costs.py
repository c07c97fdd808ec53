"""The memory of a teacher on GPUs, and how fast it writes: what is shared, what is on each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.models.resolve import read_model_config
from pipeline.models.shape import ModelShape, model_shape
from pipeline.teacher.costs import device_memory, reading_flops, writing_rate
from pipeline.teacher.settings import CaptureSettings, TeacherSettings

GIB = 1 << 30
SHAPE = ModelShape(
    hidden=4096, layers=32, vocab_size=128_000, inner=14_336, heads=32, kv_heads=8, head_dim=128,
    tied=False,
)  # fmt: skip


def _memory(shape: ModelShape, parallel: int, *, resident: int | None = None) -> int:
    settings = TeacherSettings(tensor_parallel_size=parallel, batch_tokens=4096)
    return device_memory(shape, settings, CaptureSettings(), max_length=1024, resident=resident)


def test_weights_are_shared_and_heads_repeated() -> None:
    one, four = _memory(SHAPE, 1), _memory(SHAPE, 4)
    assert one > SHAPE.weight_bytes + GIB
    assert four == pytest.approx(SHAPE.weight_bytes / 4 + GIB, rel=0.5)
    # A token's keys and values: two of 8 heads of 32 layers, in 16 bits, on each of four GPUs.
    held = [_memory(SHAPE, 4, resident=10_000 + more) for more in (0, 1000)]
    assert held[1] - held[0] == pytest.approx(1000 * 2 * 2 * 32 * 2 * 128, abs=1)
    # More GPUs than heads: each has a whole one.
    held = [_memory(SHAPE, 16, resident=10_000 + more) for more in (0, 1000)]
    assert held[1] - held[0] == pytest.approx(1000 * 2 * 2 * 32 * 1 * 128, abs=1)


def test_stages_of_a_pipeline_share_the_layers() -> None:
    settings = TeacherSettings(
        tensor_parallel_size=4, batch_tokens=4096, engine_options={"pipeline_parallel_size": 2}
    )
    both = device_memory(SHAPE, settings, CaptureSettings(), max_length=1024)
    saved = _memory(SHAPE, 4) - both
    assert saved == pytest.approx(SHAPE.weight_bytes / 8 + 4096 * 2 * 2 * 16 * 2 * 128, abs=2)


def test_quantised_experts() -> None:
    experts = replace(SHAPE, experts=16, active_experts=2, linear_bytes=1.0)
    assert experts.used_parameters < experts.parameters / 4
    assert experts.weight_bytes < 1.1 * experts.parameters
    assert reading_flops(experts, tokens=10) == 20 * experts.used_parameters


def test_writing_is_bound_by_memory() -> None:
    settings = TeacherSettings()
    rates = [
        writing_rate(SHAPE, settings, sequences=many, context=1000, bytes_per_s=1e12)
        for many in (1, 64, 256)
    ]
    assert rates[0] == pytest.approx(1e12 / SHAPE.weight_bytes, rel=0.02)
    assert rates[0] < rates[1] < rates[2] < 256 * rates[0]


def test_a_config_that_leaves_out_what_its_class_has(tmp_path: Path) -> None:
    """As Gemma 3 4B is published: neither vocabulary nor heads."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {**text, "model_type": "gemma3_text"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = model_shape(read_model_config(tmp_path))
    assert (shape.vocab_size, shape.heads, shape.kv_heads) == (262_208, 8, 4)
    assert (shape.head_dim, shape.tied, shape.hidden) == (256, True, 2560)
    # Code that comes with a model is not asked.
    config["model_type"] = "no_such_model"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "vocab_size" not in read_model_config(tmp_path)["text_config"]
