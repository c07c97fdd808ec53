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
    Check("resume", "does a run stopped by SIGTERM go on as if nobody had stopped it",
          "tests.gpu.runs:resumed", limit_s=300),
    Check("two-processes", "do two processes train as one",
          "tests.gpu.runs:two_processes", processes=2, limit_s=300),
    Check("dead-peer", "does a run that loses a process end",
          "tests.gpu.runs:a_dead_peer", processes=2, limit_s=300),
)  # fmt: skip
