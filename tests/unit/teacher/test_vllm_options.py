"""Options of vLLM by name, and those of the device; the dtype of a head by the model's config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.teacher.engines.base import EngineInfo
from pipeline.teacher.engines.registry import with_head
from pipeline.teacher.engines.vllm import _capture_options
from pipeline.teacher.engines.vllm_head import head_dtype, head_is_quantised
from pipeline.teacher.engines.vllm_options import (
    _TAKEN,
    capture_sequences,
    check_engine_options,
    common_options,
    known_options,
)
from pipeline.teacher.settings import CaptureSettings, TeacherSettings

GPU = EngineInfo("vllm", "0.32.0", "bfloat16", "cuda")
CPU = EngineInfo("vllm", "0.32.0", "float32", "cpu")


def test_vllm_knows_its_options_and_those_set_here() -> None:
    known = known_options()
    assert {"quantization", "kv_cache_dtype", "pipeline_parallel_size", "load_format"} <= known
    assert not _TAKEN.keys() - known, "an option that is refused does not exist any more"
    check_engine_options({"quantization": "fp8", "hf_overrides": {"rope_theta": 1e6}})
    check_engine_options({})


def test_all_mistakes_are_told_with_the_nearest_right_name() -> None:
    wrong = {"quantisation": "fp8", "max_model_len": 9, "enable_lora": True, "hf_overrides": 3}
    with pytest.raises(ConfigError) as caught:
        check_engine_options(wrong)
    text = str(caught.value)
    assert "did you mean quantization?" in text
    assert "max_model_len, which this stage sets itself: use corpus.max_length" in text
    assert "merge the adapter" in text
    assert "expected a mapping" in text


def test_machines_that_share_a_teacher_are_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = {"distributed_executor_backend": "ray", "pipeline_parallel_size": 2}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="install ray into the teacher's environment"):
        check_engine_options(ray)
    with pytest.raises(ConfigError, match="node_rank, which this stage sets itself: machines that"):
        check_engine_options({"nnodes": 2, "node_rank": 1})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "vllm" else name)
    check_engine_options(ray)
    teacher = TeacherSettings(tensor_parallel_size=8, engine_options=ray)
    assert (teacher.is_placed_by_ray, teacher.devices) == (True, 16)


def test_transformers_has_no_options_of_vllm() -> None:
    with pytest.raises(ValueError, match=r"engine_options: found quantization.*vllm alone"):
        TeacherSettings(engine="transformers", engine_options={"quantization": "fp8"})


def test_the_users_options_stand_above_the_common_ones() -> None:
    teacher = TeacherSettings(
        engine_options={
            "max_num_seqs": 7, "enforce_eager": True, "hf_overrides": {"rope_theta": 5.0},
            "compilation_config": {"mode": 0},
        }
    ).for_device(on_gpu=True)  # fmt: skip
    quantised = {"quantization_config": {"quant_method": "gptq", "lm_head": True}}
    own = _capture_options(quantised, GPU, teacher)
    options = common_options(Path("m"), teacher, GPU, own)
    assert options["max_num_seqs"] == 7
    assert options["enforce_eager"] is True
    assert options["hf_overrides"] == {"rope_theta": 5.0, "head_dtype": "model"}
    assert options["compilation_config"] == {"mode": 0, "cudagraph_mode": "NONE"}
    assert options["enable_flashinfer_autotune"] is False
    assert "enable_flashinfer_autotune" in known_options()


def test_defaults_go_by_the_device() -> None:
    teacher, capture = TeacherSettings(), CaptureSettings()
    on_gpu = teacher.for_device(on_gpu=True)
    assert (on_gpu.step_tokens, capture.for_device(on_gpu=True).chunk_rows) == (16_384, 1024)
    on_cpu = teacher.for_device(on_gpu=False)
    assert (on_cpu.step_tokens, capture.for_device(on_gpu=False).chunk_rows) == (2048, 256)
    given = TeacherSettings(batch_tokens=64).for_device(on_gpu=True)
    assert given.step_tokens == 64
    assert CaptureSettings(head_rows=9).for_device(on_gpu=True).chunk_rows == 9
    # A prefill is one large step: graphs of small ones cost start-up and memory for nothing.
    assert _capture_options({}, GPU, on_gpu)["compilation_config"] == {"cudagraph_mode": "NONE"}
    assert "compilation_config" not in _capture_options({}, CPU, on_cpu)
    # Rows of 30 tokens fill a step.
    assert _capture_options({}, GPU, on_gpu)["max_num_seqs"] >= 16_384 / 30
    assert [capture_sequences(tokens) for tokens in (16, 2048, 16_384)] == [16, 256, 1024]


def test_a_worker_takes_the_gpus_of_its_layers_and_stages() -> None:
    assert TeacherSettings().devices == 1
    two = TeacherSettings(tensor_parallel_size=4, engine_options={"pipeline_parallel_size": 2})
    assert two.devices == 8


@pytest.mark.parametrize(
    ("said", "quantised"),
    [
        (None, False),
        ({"quant_method": "gptq", "bits": 4}, False),
        ({"quant_method": "gptq", "bits": 4, "lm_head": True}, True),
        ({"quant_method": "awq", "lm_head": False}, False),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, False),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, False),
        (
            {
                "quant_method": "compressed-tensors", "ignore": ["lm_head"],
                "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8}}},
            },
            False,
        ),
        (
            {
                "quant_method": "compressed-tensors", "ignore": ["re:.*vision.*"],
                "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8}}},
            },
            True,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"targets": ["re:.*lm_head"], "weights": {"num_bits": 4}}},
            },
            True,
        ),
        ({"quant_method": "modelopt", "quantization": {"exclude_modules": ["lm_head"]}}, False),
        ({"quant_method": "modelopt", "quantization": {"exclude_modules": []}}, True),
        ({"quant_method": "auto-round", "extra_config": {"lm_head": {"bits": 4}}}, True),
    ],
)  # fmt: skip
def test_a_quantised_head_is_multiplied_in_the_models_dtype(
    said: dict[str, Any] | None, quantised: bool
) -> None:
    config: dict[str, Any] = {} if said is None else {"quantization_config": said}
    assert head_is_quantised(config) == quantised
    assert head_dtype(config, "bfloat16") == ("bfloat16" if quantised else "float32")
    # In the identity, as everything that decides the bytes.
    info = with_head(GPU, TeacherSettings(), config)
    assert info.head_dtype == ("bfloat16" if quantised else "float32")
    options = _capture_options(config, GPU, TeacherSettings())
    assert options.get("hf_overrides") == ({"head_dtype": "model"} if quantised else None)


def test_what_the_user_says_of_the_head_is_followed() -> None:
    teacher = TeacherSettings(engine_options={"hf_overrides": {"head_dtype": "model"}})
    assert with_head(GPU, teacher, {}).head_dtype == "bfloat16"
    by_config = head_dtype({"head_dtype": "torch.float32"}, "bfloat16")
    assert by_config == "float32"
    other = EngineInfo("transformers", "5.19", "bfloat16", "cuda")
    assert with_head(other, TeacherSettings(), {}).head_dtype == "bfloat16"
