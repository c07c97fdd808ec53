"""Batches on their way to a device, with a stand-in that counts: what is sent, and when."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.data.collate import Batch, collate
from pipeline.data.stream.feed import StepFeed
from pipeline.data.stream.train_stream import StepBatch
from pipeline.data.transfer import Transfer
from pipeline.errors import StoreError

MakeSource = Callable[..., Any]


class _Link:
    """A device beside the host: copies what is pinned, and writes down what happens."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.pinned: list[Tensor] = []
        self.used: list[Tensor] = []
        self.sent_bytes = 0
        self._beside = False

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def copy(self, tensor: Tensor) -> Tensor:
        assert self._beside, "on the stream beside the compute"
        assert any(tensor is known for known in self.pinned), "from pinned memory"
        self.sent_bytes += tensor.numel() * tensor.element_size()
        return tensor.clone()

    @contextmanager
    def beside_compute(self) -> Generator[None]:
        self._beside = True
        yield
        self._beside = False

    def mark(self) -> str:
        self.events.append("send")
        return f"mark {self.events.count('send')}"

    def wait(self, mark: str) -> None:
        self.events.append(f"wait for {mark}")

    def used_by_compute(self, tensor: Tensor) -> None:
        self.used.append(tensor)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {
        field.name: value
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }


@pytest.fixture(params=[False, True])
def batch(request: pytest.FixtureRequest, make_source: MakeSource) -> Batch:
    return collate(make_source([5], inclusion=request.param, seed=3).rows[0], temperature=2.0)


def test_a_batch_arrives_whole_and_its_ids_travel_narrow(batch: Batch) -> None:
    link = _Link()
    there = Transfer("cpu", link=link).move(batch)
    before, after = _tensors(batch), _tensors(there)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    assert {tensor.dtype for tensor in link.pinned} == {torch.int32, torch.float32}
    assert link.sent_bytes == 4 * sum(tensor.numel() for tensor in before.values())
    assert (there.sample_ids, there.lengths) == (batch.sample_ids, batch.lengths)
    assert link.events == ["send", "wait for mark 1"]
    # Their memory is not taken for the next batch while the device computes with them.
    assert [id(tensor) for tensor in link.used] == [id(tensor) for tensor in after.values()]


def test_on_a_cpu_the_tensors_are_the_same(batch: Batch) -> None:
    transfer = Transfer("cpu")
    assert not transfer.is_ahead
    there = transfer.move(batch)
    assert all(there_is is _tensors(batch)[name] for name, there_is in _tensors(there).items())


def _feed(
    link: _Link | None, *, steps: int = 3, ready: bool = True, breaks: bool = False
) -> tuple[StepFeed, list[str]]:
    events = link.events if link else []

    def stream() -> Generator[StepBatch, None, None]:
        for step in range(steps):
            events.append(f"fetch {step}")
            yield StepBatch(step, 0, [collate([], temperature=1.0)], 0, 0)
        if breaks:
            raise StoreError("no data")

    return StepFeed(stream(), Transfer("cpu", link=link), ready=lambda: ready), events


def _compute(feed: StepFeed, events: list[str]) -> None:
    for step in feed:
        events.append(f"compute {step.step}")
        feed.look_ahead()
        events.append(f"read {step.step}")


def test_the_next_step_is_sent_while_one_is_computed() -> None:
    feed, events = _feed(_Link(), steps=2)
    _compute(feed, events)
    assert events == [
        "fetch 0", "send", "wait for mark 1", "compute 0",
        "fetch 1", "send", "read 0", "wait for mark 2", "compute 1", "read 1",
    ]  # fmt: skip


@pytest.mark.parametrize("with_link", [False, True])
def test_nothing_is_waited_for_early(with_link: bool) -> None:
    """A step that is not there yet, or a CPU: one after the other."""
    feed, events = _feed(_Link() if with_link else None, steps=2, ready=False)
    _compute(feed, events)
    kept = [event for event in events if event.split()[0] in ("fetch", "compute", "read")]
    assert kept == ["fetch 0", "compute 0", "read 0", "fetch 1", "compute 1", "read 1"]


def test_what_goes_wrong_early_is_raised_when_its_step_comes() -> None:
    feed, events = _feed(_Link(), steps=1, breaks=True)
    with pytest.raises(StoreError, match="no data"):
        _compute(feed, events)
    assert events[-1] == "read 0", "the step before it is logged and saved"


def test_an_empty_batch_travels_too() -> None:
    empty = replace(collate([], temperature=1.0), sample_ids=())
    assert Transfer("cpu", link=_Link()).move(empty).num_loss_tokens == 0
