"""A GPU, none, one that is hidden, and one whose driver is too old."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError, ResourceError
from pipeline.models import device
from pipeline.models.device import uses_gpu

DRIVER = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Mar  4 16:07:00 UTC 2025\n"
    "GCC version: gcc version 12.3.0\n"
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Return a machine with a GPU and driver 570, and torch for CUDA 13 that sees no device."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "version").write_text(DRIVER.format("570.124.06"))
    monkeypatch.setattr(device, "_DEVICES", tmp_path)
    monkeypatch.setattr(device, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    for name in ("DISTILL_DEVICE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_driver_that_is_too_old_is_refused(machine: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError) as caught:
        uses_gpu()
    message = str(caught.value)
    assert "its driver is 570.124.06; expected 580 or newer, for CUDA 13.0" in message
    assert "update the driver, or run on the CPU with DISTILL_DEVICE=cpu" in message


def test_other_reasons(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(DRIVER.format("580.65.06"))
    with pytest.raises(ResourceError, match=r"driver 580\.65\.06, CUDA 13\.0, and torch finds"):
        uses_gpu()
    machine.setattr("torch.version.cuda", None)
    with pytest.raises(ResourceError, match="it is a build for CPUs; expected a build for GPUs"):
        uses_gpu()


def test_none_a_hidden_one_and_the_cpu_by_choice(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine.setenv("DISTILL_DEVICE", "cpu")
    assert not uses_gpu()
    machine.delenv("DISTILL_DEVICE")
    machine.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not uses_gpu()
    machine.delenv("CUDA_VISIBLE_DEVICES")
    # A container sees the host's driver, but no device that is not given to it.
    (tmp_path / "nvidia0").unlink()
    assert not uses_gpu()
    machine.setenv("DISTILL_DEVICE", "gpu")
    with pytest.raises(ResourceError):
        uses_gpu()
    machine.setenv("DISTILL_DEVICE", "tpu")
    with pytest.raises(ConfigError, match="DISTILL_DEVICE is 'tpu'; expected cpu, gpu or nothing"):
        uses_gpu()


def test_one_that_torch_sees(machine: pytest.MonkeyPatch) -> None:
    machine.setattr("torch.cuda.is_available", lambda: True)
    assert uses_gpu()
    machine.setenv("DISTILL_DEVICE", "cpu")
    assert not uses_gpu()
