"""Accelerators by their data sheets, and the shares of their peaks that forecasts count on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pydantic import field_validator, model_validator

from pipeline.config import Settings, option
from pipeline.config.fields import suggestion

__all__ = [
    "BANDWIDTH_SHARE", "DEVICES", "FULL_SHARE", "READING_SHARE", "TRAINING_SHARE", "Device",
    "ForecastSettings", "device_of_driver",
]  # fmt: skip

READING_SHARE = 0.4
"""Of a device's peak operations that reading reaches."""
TRAINING_SHARE = 0.35
"""The same of training."""
BANDWIDTH_SHARE = 0.6
"""Of a device's memory bandwidth that writing reaches."""
FULL_SHARE = 0.92
"""Of a device's memory that training may fill: the rest is fragments and NCCL's."""


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator, by its data sheet."""

    name: str
    memory_gib: float
    """That programs can use."""
    flops: float
    """Dense operations a second in bfloat16; FP8 weights are counted at the same rate."""
    bytes_per_s: float
    """Of its memory."""


DEVICES = {
    "a10g": Device("A10G 24 GB", 22.3, 70e12, 0.6e12),
    "l4": Device("L4 24 GB", 22.4, 121e12, 0.3e12),
    "rtx4090": Device("RTX 4090 24 GB", 23.5, 165e12, 1.008e12),
    "l40s": Device("L40S 48 GB", 44.4, 362e12, 0.864e12),
    "a100-40gb": Device("A100 40 GB", 39.4, 312e12, 1.555e12),
    "a100-80gb": Device("A100 80 GB", 79.1, 312e12, 2.039e12),
    "h100": Device("H100 80 GB", 79.0, 989e12, 3.35e12),
    "h200": Device("H200 141 GB", 139.8, 989e12, 4.8e12),
    "b200": Device("B200 180 GB", 178.0, 2250e12, 8e12),
}
"""By the name that `--device` takes."""

_DRIVER_NAMES = {
    "NVIDIA A10G": "a10g",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA L40S": "l40s",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""By the name that the driver gives. The H100 and H200 of PCIe cards (PCIe, NVL) are missing: their
peaks are lower."""


def device_of_driver(name: str) -> Device | None:
    """Return the device that the driver calls so; None where it is not known for sure."""
    key = _DRIVER_NAMES.get(name)
    return None if key is None else DEVICES[key]


class ForecastSettings(Settings):
    """Hardware that this machine does not have, for `--dry-run`."""

    device: str | None = option(
        None,
        f"with --dry-run: forecast memory and time on this device: {', '.join(DEVICES)}; none: "
        "this machine",
        flag="device",
    )
    devices: int = option(1, "with --device: how many of them", flag="devices", ge=1)

    @field_validator("device")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is None:
            return None
        known = name.lower()
        if known not in DEVICES:
            raise ValueError(
                f"found {name!r}, expected one of {', '.join(DEVICES)}"
                f"{suggestion(known, list(DEVICES))}"
            )
        return known

    @model_validator(mode="after")
    def _of_a_device(self) -> Self:
        if self.devices > 1 and self.device is None:
            raise ValueError(f"devices: found {self.devices} without device, expected its name")
        return self

    @property
    def named(self) -> Device | None:
        """The device, where one is named."""
        return None if self.device is None else DEVICES[self.device]
