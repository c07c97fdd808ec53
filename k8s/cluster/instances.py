"""GPUs, EFA interfaces, CPUs and memory of the instance types that overlays name."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["INSTANCES", "Instance", "quantity"]


@dataclass(frozen=True, slots=True)
class Instance:
    """One node of SageMaker HyperPod, from the table of its command-line tool."""

    gpus: int
    efa: int
    vcpus: int
    memory_gib: int
    gpu_memory_gb: int

    @property
    def allocatable_cpus(self) -> float:
        """What pods may ask for; kubelet and system daemons take the rest."""
        return 0.93 * self.vcpus

    @property
    def allocatable_bytes(self) -> float:
        """Memory that pods may ask for; kubelet and system daemons take the rest."""
        return 0.93 * self.memory_gib * 2**30


INSTANCES = {
    "ml.p4d.24xlarge": Instance(8, 4, 96, 1152, 40),
    "ml.p4de.24xlarge": Instance(8, 4, 96, 1152, 80),
    "ml.p5.48xlarge": Instance(8, 32, 192, 2048, 80),
    "ml.p5e.48xlarge": Instance(8, 32, 192, 2048, 141),
    "ml.p5en.48xlarge": Instance(8, 16, 192, 2048, 141),
    "ml.p6-b200.48xlarge": Instance(8, 8, 192, 2048, 180),
}

_SUFFIXES = {
    "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40,
}  # fmt: skip


def quantity(value: object) -> float:
    """Return a Kubernetes quantity (`250m`, `16Gi`, `8`) as a number; NaN where it is none."""
    text = str(value).strip()
    number = text.rstrip("KMGTkmi")
    try:
        return float(number) * _SUFFIXES[text[len(number) :]]
    except (ValueError, KeyError):
        return math.nan
