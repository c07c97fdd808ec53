"""Training in 16 bits: the first steps of each ZeRO stage, whole runs against float32, fp16."""

from __future__ import annotations

from pipeline.student.training.deepspeed_engine import init_distributed, shut_down_distributed
from pipeline.student.training.distributed import read_distributed
from tests.bench.zero_stages import first_steps, sums
from tests.gpu.check import Figure, Place, at_least, at_most
from tests.gpu.runs import Runs, loss_gap

__all__ = ["first_steps_of_stages", "float16", "runs_against_float32"]

_STAGES = (0, 1, 2, 3)
_SUM = 1 + 63 / 512
"""Of the gradients that `sums` takes."""


def first_steps_of_stages(_place: Place) -> list[Figure]:
    """Take the first step of AdamW in bfloat16 and sum small gradients, under each ZeRO stage."""
    init_distributed(read_distributed(), timeout_s=60)
    steps, totals = first_steps(_STAGES), sums(_STAGES, float32=True)
    shut_down_distributed()
    return [
        at_most("first_step_over_rate_highest", max(steps), 1.01),
        at_least("first_step_over_rate_lowest", min(steps), 0.99),
        at_most("error_of_small_sums", max(abs(total - _SUM) / _SUM for total in totals), 1e-2),
    ]


def runs_against_float32(place: Place) -> list[Figure]:
    """Train in bfloat16 under the stages and compare the losses with those of float32."""
    runs = Runs(place)
    whole = runs.train("float32", "--bf16", "false")
    figures = []
    for stage in _STAGES if place.on_gpu else (3,):
        found = runs.train(f"bfloat16-{stage}", "--bf16", "true", "--train.zero_stage", stage)
        figures.append(at_most(f"loss_gap_bfloat16_zero{stage}", loss_gap(whole, found), 5e-2))
    return figures


def float16(place: Place) -> list[Figure]:
    """Train in float16, whose loss is scaled: finite losses near those of float32."""
    runs = Runs(place)
    whole = runs.train("float32", "--bf16", "false")
    found = runs.train("float16", "--bf16", "false", "--fp16")
    return [at_most("loss_gap_float16", loss_gap(whole, found), 5e-2)]
