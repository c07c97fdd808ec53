"""GPUs, EFA interfaces, CPUs and memory of the instance types that overlays name."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.errors import ConfigError

__all__ = ["INSTANCES", "Instance", "find_instance", "quantity"]


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
    "ml.g6e.2xlarge": Instance(1, 0, 8, 64, 48),
    "ml.g6e.4xlarge": Instance(1, 0, 16, 128, 48),
    "ml.g6e.8xlarge": Instance(1, 1, 32, 256, 48),
    "ml.g6e.12xlarge": Instance(4, 1, 48, 384, 48),
    "ml.g6e.24xlarge": Instance(4, 2, 96, 768, 48),
    "ml.g6e.48xlarge": Instance(8, 4, 192, 1536, 48),
    "ml.p4d.24xlarge": Instance(8, 4, 96, 1152, 40),
    "ml.p4de.24xlarge": Instance(8, 4, 96, 1152, 80),
    "ml.p5.4xlarge": Instance(1, 1, 16, 256, 80),
    "ml.p5.48xlarge": Instance(8, 32, 192, 2048, 80),
    "ml.p5e.48xlarge": Instance(8, 32, 192, 2048, 141),
    "ml.p5en.48xlarge": Instance(8, 16, 192, 2048, 141),
    "ml.p6-b200.48xlarge": Instance(8, 8, 192, 2048, 180),
    "ml.p6-b300.48xlarge": Instance(8, 16, 192, 4096, 269),
}
"""By the label of HyperPod's nodes."""


def find_instance(name: str) -> tuple[str, Instance]:
    """Return type and node for `ml.p5en.48xlarge`, `p5en.48xlarge` or `p5en`.

    Raises:
        ConfigError: none, or several, are called so.
    """
    full = name if name.startswith("ml.") else f"ml.{name}"
    fitting = [key for key in INSTANCES if full in (key, key.rpartition(".")[0])]
    if len(fitting) != 1:
        raise ConfigError(
            f"instance {name!r}: {'several are' if fitting else 'none is'} called so",
            expected=f"one of {', '.join(fitting or INSTANCES)}",
            do="give another INSTANCE=, or write an overlay (k8s/README.md, How it is organised)",
        )
    return fitting[0], INSTANCES[fitting[0]]


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
