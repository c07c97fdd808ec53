"""How fast steps are: tokens a second, the share of the device's peak, waiting, peak memory.

A GPU works on while the host goes to the next step, so the time of a single step says little. Steps
are added up until the values are read, at which point the device has done them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.data.collate import Batch
from pipeline.data.stream.train_stream import StepBatch
from pipeline.observe.memory import gpu_peak_bytes, peak_rss_bytes

__all__ = ["Peak", "StepSpeed"]

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Peak:
    """What this rank's device could do, and what its batches ask for."""

    flops_per_s: float
    """Of the device by its data sheet."""
    flops_of: Callable[[Batch], float]
    """Operations of a forward and a backward pass."""


class StepSpeed:
    """Adds up the steps since the last reading."""

    def __init__(self, *, devices: int, peak: Peak | None) -> None:
        """Start at zero.

        Args:
            devices: processes of the run.
            peak: None where it is not known; there is no `throughput/mfu` then.
        """
        self._devices = devices
        self._peak = peak
        self._clear()

    def add(self, step: StepBatch, *, seconds: float, waited: float) -> None:
        """Count a step.

        Args:
            step: with the tokens of all ranks, and the batches of this one.
            seconds: of its work as the host saw it.
            waited: seconds before it, for its data.
        """
        self._steps += 1
        self._tokens += step.num_tokens
        self._seconds += seconds + waited
        self._waited += waited
        if self._peak is not None:
            self._flops += sum(self._peak.flops_of(batch) for batch in step.micro_batches)

    def take(self) -> dict[str, float]:
        """Return means over the steps since the last call, and peaks of the whole run."""
        rate = self._tokens / self._seconds
        values = {
            "throughput/tokens_per_s": rate,
            "throughput/tokens_per_s_per_device": rate / self._devices,
            "data/wait_s": self._waited / self._steps,
            "memory/peak_gib": peak_rss_bytes() / _GIB,
        }
        if self._peak is not None:
            values["throughput/mfu"] = self._flops / self._seconds / self._peak.flops_per_s
        on_device = gpu_peak_bytes()
        if on_device is not None:
            values["memory/device_peak_gib"] = on_device / _GIB
        self._clear()
        return values

    def _clear(self) -> None:
        self._steps, self._tokens = 0, 0
        self._seconds, self._waited, self._flops = 0.0, 0.0, 0.0
