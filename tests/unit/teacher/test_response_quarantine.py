"""Responses that the teacher fails on are found, tried often enough, and quarantined."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.errors import ModelError
from pipeline.storage import Store
from pipeline.teacher.fleet.inflight import InFlightMarker
from pipeline.teacher.generation.base import WriteRequest, Written
from pipeline.teacher.generation.quarantine import write_or_quarantine


class _Teacher:
    """Raises for calls with a bad prompt; fewer than `patience` times where one is given."""

    def __init__(self, bad: Sequence[int], patience: int = 10**9, together: int = 10**9) -> None:
        self.bad = {f"r{n}" for n in bad}
        self.patience = patience
        self.together = together
        self.calls: list[list[str]] = []

    def write(
        self,
        requests: Sequence[WriteRequest],
        *,
        on_responses: Callable[[int], None] | None = None,
    ) -> list[Written]:
        names = [request.response_id for request in requests]
        self.calls.append(names)
        if len(names) > self.together:
            raise MemoryError("too many")
        if self.bad & set(names) and self.patience:
            self.patience -= 1
            raise RuntimeError("index out of range\nmore")
        if on_responses is not None:
            on_responses(len(names))
        # As of a real engine, the tokens depend on the company.
        return [Written(np.array([len(names), int(n[1:])], np.int32), None) for n in names]

    def close(self) -> None:
        pass


def _requests(count: int) -> list[WriteRequest]:
    return [WriteRequest(f"r{n}", np.array([1], np.int32), n) for n in range(count)]


@given(st.integers(1, 40), st.data(), st.integers(1, 4))
def test_exactly_the_bad_ones_are_quarantined(count: int, data: st.DataObject, tries: int) -> None:
    bad = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    # Where none of a few prompts from end to end is answered, the engine counts as broken.
    assume(not set(range(0, count, max(1, count // 8))) <= bad)
    teacher = _Teacher(sorted(bad))
    told: list[int] = []
    written = write_or_quarantine(teacher, _requests(count), tries=tries, on_responses=told.append)
    for number, one in enumerate(written):
        if number in bad:
            assert one == QuarantinedRow(f"r{number}", "RuntimeError: index out of range", tries)
        else:
            # From one call with all that are kept, and with nothing else.
            assert isinstance(one, Written)
            assert one.token_ids_N.tolist() == [count - len(bad), number]
    alone = Counter(names[0] for names in teacher.calls if len(names) == 1)
    assert all(alone[f"r{number}"] >= tries or count == 1 for number in bad)
    assert sum(told) == count


def test_what_passes_leaves_no_trace() -> None:
    teacher = _Teacher([3], patience=2)
    written = write_or_quarantine(teacher, _requests(8), tries=3)
    assert all(isinstance(one, Written) for one in written)
    assert [len(names) for names in teacher.calls] == [8, 8, 8]


def test_a_teacher_that_answers_nothing_quarantines_nothing() -> None:
    with pytest.raises(ModelError, match="writes nothing for 5 prompts; of response r0: Runtime"):
        write_or_quarantine(_Teacher(range(5)), _requests(5), tries=2)


def test_too_many_together_is_no_prompts_fault() -> None:
    with pytest.raises(ModelError, match="fails for 8 responses together, though for none alone"):
        write_or_quarantine(_Teacher([], together=7), _requests(8), tries=2)


def test_a_prompt_that_kills_the_process_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    class Deadly(_Teacher):
        def write(self, requests: Sequence[WriteRequest], **_: Any) -> list[Written]:
            if "r3" in {request.response_id for request in requests}:
                raise Killed
            return super().write(requests)

    # A process that is killed says nothing any more.
    monkeypatch.setattr(InFlightMarker, "take_back", lambda _: None)
    store = Store(f"memory://{uuid.uuid4().hex}")
    for _ in range(2):
        marker = InFlightMarker(store, "responses-00000")
        with pytest.raises(Killed):
            write_or_quarantine(Deadly([5]), _requests(8), tries=2, marker=marker)
    marker = InFlightMarker(store, "responses-00000")
    written = write_or_quarantine(Deadly([5]), _requests(8), tries=2, marker=marker)
    lost = {one.sample_id: one.error for one in written if isinstance(one, QuarantinedRow)}
    assert lost == {
        "r3": "the process died while the engine had it", "r5": "RuntimeError: index out of range",
    }  # fmt: skip
    # The others are of one call.
    assert {int(one.token_ids_N[0]) for one in written if isinstance(one, Written)} == {6}
