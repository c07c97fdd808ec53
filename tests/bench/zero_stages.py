"""The first optimiser step of bfloat16 weights under each ZeRO stage, over that of stage 2.

`make bench-zero-stages`. The weights begin at zero, so that bfloat16 rounds their change by at most
1/256; their gradients are known, and AdamW's first step is the learning rate whatever they are.
DeepSpeed's optimiser for 16-bit weights without ZeRO has taken a step on zero gradients before, and
its first step is 0.735 of that (`--deepspeed_zero0`). A second part sums 64 gradients, one of 1 and
63 of 1/512: in bfloat16 the small ones are lost.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.student.settings.train import TrainSettings
from pipeline.student.training.deepspeed_engine import (
    DeepSpeedEngine,
    init_distributed,
    shut_down_distributed,
)
from pipeline.student.training.distributed import read_distributed

SIDE = 8
"""The weights are a matrix of SIDE x SIDE."""
RATE = 2.0**-6
SMALL = [1.0, *[1 / 512] * 63]


class Product(torch.nn.Module):
    """The sum of its weights times a number, which is their gradient."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(SIDE, SIDE, dtype=dtype))

    def forward(self, gradient: float) -> tuple[torch.Tensor]:
        """Return the loss alone."""
        return ((self.weight * gradient).sum(),)


def opened(settings: TrainSettings, *, dtype: str = "bfloat16", steps: int = 100) -> Any:
    """Return the pipeline's engine around a `Product`; the process group is open."""
    module = Product(getattr(torch, dtype))
    groups = [{"params": [module.weight], "weight_decay": 0.0}]
    return DeepSpeedEngine(
        module, settings, dtype=dtype, distributed=read_distributed(), total_steps=steps,
        optimizer_groups=groups,
    )  # fmt: skip


def change(
    settings: TrainSettings, gradients: Sequence[float], *, dtype: str = "bfloat16"
) -> float:
    """Return how much one step on these gradients, one a pass, lowers the weights."""
    engine = opened(settings, dtype=dtype)
    engine.train_step([{"gradient": value} for value in gradients])
    weight = next(engine.module.parameters())
    found = -float(weight.detach().double().mean())
    engine.close()
    return found


def first_steps(stages: Sequence[int], **more: Any) -> list[float]:
    """Return the first step of AdamW over the learning rate, for each stage."""
    plain = {"warmup_ratio": 0, "lr_scheduler_type": "constant", "learning_rate": RATE}
    return [
        change(
            TrainSettings(zero_stage=stage, gradient_accumulation_steps=1, **plain, **more), [0.25]
        )
        / RATE
        for stage in stages
    ]


def sums(stages: Sequence[int], *, float32: bool) -> list[float]:
    """Return the sum of the small gradients (1.123) that plain descent takes, for each stage."""
    found = []
    for stage in stages:
        settings = TrainSettings(
            zero_stage=stage, gradient_accumulation_steps=len(SMALL), optim="sgd", learning_rate=1,
            warmup_ratio=0, lr_scheduler_type="constant", max_grad_norm=0,
            accumulate_float32=float32,
        )  # fmt: skip
        # DeepSpeed divides by the number of passes.
        found.append(change(settings, SMALL) * len(SMALL))
    return found


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--deepspeed_zero0", action="store_true", help="DeepSpeed's own stage 0 instead of ours"
    )
    parser.add_argument("--stages", default="0,1,2,3", help="0 and 2 among them")
    arguments = parser.parse_args()
    if arguments.deepspeed_zero0:
        TrainSettings.stage = lambda self, **_options: self.zero_stage or 0  # type: ignore[method-assign]
    init_distributed(read_distributed(), timeout_s=60)
    stages = [int(stage) for stage in arguments.stages.split(",")]
    steps = first_steps(stages)
    print("first step over the learning rate: " + ", ".join(f"{s:.3f}" for s in steps))
    for float32 in (True, False):
        if not arguments.deepspeed_zero0:
            name = "float32" if float32 else "bfloat16"
            found = sums(stages, float32=float32)
            print(f"sum in {name:<8} (1.123): " + ", ".join(f"{s:.3f}" for s in found))
    ratio = steps[stages.index(0)] / steps[stages.index(2)]
    print(f"FIGURE bf16_zero0_first_step_over_zero2 {ratio:.3f}")
    shut_down_distributed()


if __name__ == "__main__":
    main()
