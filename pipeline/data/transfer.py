"""Batches from the host to a device; on a GPU pinned, beside the compute, and with narrow ids.

A copy from ordinary memory makes the host wait, and its int64 ids are twice as long as need be.
Here tensors are copied to pinned memory, ids as int32, sent on a stream of their own and widened
there; the compute waits for them on the device, the host for nothing. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.data.collate import Batch

__all__ = ["Link", "Sent", "Transfer"]


class Link(Protocol):
    """How tensors reach one device."""

    def pin(self, tensor: Tensor) -> Tensor:
        """Return a copy from which the device reads while the host goes on."""

    def copy(self, tensor: Tensor) -> Tensor:
        """Start the copy of a pinned tensor to the device."""

    def beside_compute(self) -> AbstractContextManager[Any]:
        """What is started while open runs beside the compute."""

    def mark(self) -> Any:
        """Return a mark after all that was started beside the compute so far."""

    def wait(self, mark: Any) -> None:
        """Let the compute, not the host, wait for a mark."""

    def used_by_compute(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor from reuse until the compute is done with it."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A batch under way."""

    batch: Batch
    mark: Any


class Transfer:
    """Sends batches to one device."""

    def __init__(self, device: torch.device | str, *, link: Link | None = None) -> None:
        """Open a stream beside the compute, if the device has such.

        Args:
            device: where batches belong.
            link: to it; None: CUDA's for a GPU, and a plain `Batch.to` for other devices.
        """
        self._device = torch.device(device)
        self._link = link
        if link is None and self._device.type == "cuda":
            self._link = _CudaLink(self._device)

    @property
    def is_ahead(self) -> bool:
        """Whether copies run beside the compute, so that sending early is of use."""
        return self._link is not None

    def send(self, batch: Batch) -> Sent:
        """Start the copies."""
        link = self._link
        if link is None:
            return Sent(batch.to(self._device), None)
        pinned = _each_tensor(batch, lambda tensor: link.pin(_narrow(tensor)))
        with link.beside_compute():
            there = _each_tensor(pinned, lambda tensor: _wide(link.copy(tensor)))
            return Sent(there, link.mark())

    def receive(self, sent: Sent) -> Batch:
        """Return the batch for use by the compute; all ids are int64."""
        if self._link is not None:
            self._link.wait(sent.mark)
            _each_tensor(sent.batch, self._used)
        return sent.batch

    def move(self, batch: Batch) -> Batch:
        """Send and receive."""
        return self.receive(self.send(batch))

    def _used(self, tensor: Tensor) -> Tensor:
        assert self._link is not None
        self._link.used_by_compute(tensor)
        return tensor


def _narrow(tensor: Tensor) -> Tensor:
    """Token ids and places in a batch fit in 31 bits."""
    return tensor.to(torch.int32) if tensor.dtype == torch.int64 else tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int64) if tensor.dtype == torch.int32 else tensor


def _each_tensor(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    changed: dict[str, Any] = {
        field.name: function(value)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return replace(batch, **changed)


class _CudaLink:
    """A side stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory()

    def copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def beside_compute(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> Any:
        return self._stream.record_event()

    def wait(self, mark: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def used_by_compute(self, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(self._device))
