"""The list of checks, in the order in which they are asked."""

from __future__ import annotations

from tests.gpu.check import Check

__all__ = ["CHECKS"]

CHECKS = (
    Check("reduction", "are the columns of the device those of the CPU",
          "tests.gpu.reduction:against_the_cpu", "teacher"),
    Check("reduction-passes", "how many reads of the logits does the reduction cost",
          "tests.gpu.reduction:over_a_read", "teacher"),
    Check("capture", "does vLLM's capture agree with transformers",
          "tests.gpu.capture:against_transformers", "teacher", limit_s=400),
    Check("capture-time", "what does the capture cost over the prefill",
          "tests.gpu.capture:over_prefill", "teacher", limit_s=400),
    Check("loss", "are loss and gradient those of float64, V odd and 262,144",
          "tests.gpu.losses:against_float64"),
    Check("loss-large", "does a chunk of more than 2^31 logits hold",
          "tests.gpu.losses:past_32_bits", gpus=1),
    Check("loss-time", "what does the loss cost over the head's matrix products",
          "tests.gpu.losses:over_matmuls"),
    Check("families", "does a packed sequence see nothing of its neighbours, by family",
          "tests.gpu.architectures:packed_against_alone", limit_s=300),
    Check("attention", "does each attention that is here agree with eager attention",
          "tests.gpu.architectures:attention_against_eager"),
    Check("first-steps", "is the first step in bfloat16 right under each ZeRO stage",
          "tests.gpu.precision:first_steps_of_stages"),
    Check("bfloat16", "do runs in bfloat16 follow float32 under each ZeRO stage",
          "tests.gpu.precision:runs_against_float32", limit_s=400),
    Check("float16", "does a run in float16 follow float32",
          "tests.gpu.precision:float16", gpus=1, limit_s=300),
    Check("memory", "is the peak memory of a training the forecast one",
          "tests.gpu.memory:against_the_forecast", gpus=1, limit_s=300),
    Check("resume", "does a run stopped by SIGTERM go on as if nobody had stopped it",
          "tests.gpu.runs:resumed", limit_s=300),
    Check("two-processes", "do two processes train as one",
          "tests.gpu.runs:two_processes", processes=2, limit_s=300),
    Check("dead-peer", "does a run that loses a process end",
          "tests.gpu.runs:a_dead_peer", processes=2, limit_s=300),
)  # fmt: skip
