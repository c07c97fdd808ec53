"""Which ZeRO stage a run has, what its first step is there, and in what gradients are summed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.student.engine.config import check_parallel, deepspeed_config
from pipeline.student.settings.train import TrainSettings
from tests.stage_runner import run_python


@pytest.mark.parametrize(
    ("train", "dtype", "processes", "stage"),
    [
        ({}, "float32", 1, 0),
        ({}, "float32", 2, 1),
        ({"gradient_accumulation_steps": 1}, "float32", 2, 2),
        ({"gradient_accumulation_steps": 1}, "bfloat16", 1, 2),
        ({}, "bfloat16", 8, 1),
        ({"offload_optimizer": True}, "float32", 1, 1),
        ({"offload_parameters": True}, "float32", 1, 3),
        ({"hpz_partition_size": 8}, "bfloat16", 16, 3),
        ({"zero_stage": 0}, "float32", 8, 0),
        ({"zero_stage": 0}, "bfloat16", 8, 1),
        ({"zero_stage": 0}, "float16", 1, 1),
        ({"zero_stage": 2}, "bfloat16", 8, 2),
        ({"zero_stage": 3}, "float32", 1, 3),
    ],
)
def test_the_stage(train: dict[str, Any], dtype: str, processes: int, stage: int) -> None:
    settings = TrainSettings(**train)
    assert settings.stage(dtype=dtype, world_size=processes) == stage
    config = deepspeed_config(settings, dtype=dtype, world_size=processes, on_gpu=True)
    assert config["zero_optimization"]["stage"] == stage


def test_first_steps_and_sums_are_the_same_at_every_stage() -> None:
    """DeepSpeed's own stage 0 gives 0.73; sums of 63 small gradients in bfloat16 give 1.0."""
    command = ["-W", "ignore", "-m", "tests.bench.zero_stages", "--stages", "0,2"]
    said = run_python(command, timeout=200).ok().out
    found = re.search(r"FIGURE bf16_zero0_first_step_over_zero2 (\S+)", said)
    assert found is not None
    assert 0.99 <= float(found[1]) <= 1.01
    float32, bfloat16 = (
        [float(value) for value in line.rsplit(": ")[1].split(", ")]
        for line in said.split("\n")
        if line.startswith("sum in")
    )
    assert float32 == pytest.approx([1 + 63 / 512] * 2, rel=1 / 256)
    assert bfloat16 == [1.0] * 2


_LAYERS_WITH_A_STATE = """
import torch
from pipeline.student.forward.body import text_body
from pipeline.student.forward.ways import BodyForward
from pipeline.student.settings.train import TrainSettings
from pipeline.student.training.deepspeed_engine import DeepSpeedEngine, init_distributed
from pipeline.student.training.distributed import read_distributed
from tests.tiny_families import family_model

class Summed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = family_model("LFM2")
        self.body = BodyForward(text_body(self.model), "alone")

    def forward(self, ids_1T):
        return (self.body(ids_1T, ids_1T, (4, 3)).hidden_TD.pow(2).mean(),)

init_distributed(read_distributed(), timeout_s=60)
for stage in (2, 3):
    module = Summed()
    settings = TrainSettings(zero_stage=stage, gradient_accumulation_steps=1, warmup_ratio=0,
                             learning_rate=1e-2)
    groups = [{"params": list(module.parameters()), "weight_decay": 0.0}]
    engine = DeepSpeedEngine(module, settings, dtype="float32", distributed=read_distributed(),
                             total_steps=9, optimizer_groups=groups)
    batch = {"ids_1T": torch.arange(7)[None]}
    print("losses", *[float(engine.train_step([batch])[0][0]) for _ in range(3)])
    engine.close()
"""


@pytest.mark.slow
def test_layers_with_a_state_train_under_stage_3_as_under_2() -> None:
    """Their code hands the weight of a convolution to a kernel without calling the module."""
    said = run_python(["-W", "ignore", "-c", _LAYERS_WITH_A_STATE], timeout=200).ok().out
    two, three = (
        [float(loss) for loss in line.split()[1:]]
        for line in said.splitlines()
        if line.startswith("losses")
    )
    assert len(set(two)) == len(two) == 3
    assert three == pytest.approx(two, rel=1e-5)


def test_what_deepspeed_is_told() -> None:
    def told(on_gpu: bool = True, dtype: str = "bfloat16", **train: Any) -> dict[str, Any]:
        settings = TrainSettings(**train)
        return deepspeed_config(settings, dtype=dtype, world_size=8, on_gpu=on_gpu)

    assert told()["zero_optimization"]["overlap_comm"]
    assert not told(on_gpu=False)["zero_optimization"]["overlap_comm"]
    assert not told(overlap_comm=False)["zero_optimization"]["overlap_comm"]
    assert not told()["timers"]["throughput"]["enabled"]
    assert told()["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in told(gradient_accumulation_steps=1)
    assert "data_types" not in told(dtype="float32")
    assert "data_types" not in told(accumulate_float32=False)
    # The buffer holds what is reduced: float32 sums under stage 1, else the weights' type.
    sizes = {stage: told(zero_stage=stage, reduce_bucket_mb=100) for stage in (1, 2, 3)}
    elements = [config["zero_optimization"]["reduce_bucket_size"] for config in sizes.values()]
    assert elements == [25_000_000, 50_000_000, 50_000_000]
    nvme = told(offload_parameters=True, offload_optimizer=True, offload_folder="/nvme")
    place = {"device": "nvme", "nvme_path": "/nvme"}
    assert nvme["zero_optimization"]["offload_param"] == place
    assert nvme["zero_optimization"]["offload_optimizer"] == place


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (
            {"offload_parameters": True, "zero_stage": 2},
            "train.offload_parameters: found true with",
        ),
        ({"quantized_weights": True, "zero_stage": 1}, "with train.zero_stage 1, expected stage 3"),
        ({"offload_folder": "/nvme"}, "without anything that is offloaded"),
        ({"torch_compile": True, "hpz_partition_size": 2}, "found true with train.hpz_partition"),
    ],
)
def test_options_that_a_stage_does_not_have(train: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TrainSettings(**train)


def test_options_that_this_machine_does_not_have() -> None:
    plus = TrainSettings(hpz_partition_size=4, quantized_gradients=True)
    with pytest.raises(ConfigError) as caught:
        check_parallel(plus, world_size=6, on_gpu=False)
    message = str(caught.value)
    assert "train.quantized_gradients: found true on a machine without a GPU" in message
    assert "train.hpz_partition_size: found 4 on a machine without a GPU" in message
    for processes, said in ((6, "6 processes"), (1, "1 process,")):
        with pytest.raises(ConfigError, match=f"hpz_partition_size: found 4 with {said}"):
            check_parallel(plus, world_size=processes, on_gpu=True)
    check_parallel(plus, world_size=8, on_gpu=True)
    check_parallel(plus, world_size=None, on_gpu=True)
