"""An engine that fails: what is tried again, what is lost; and how it batches rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ModelError
from pipeline.teacher.engines.base import CaptureRequest
from pipeline.teacher.engines.transformers import TransformersEngine, padding_share
from pipeline.teacher.fleet.quarantine import EngineLost, GuardedEngine, _not_finite
from tests.unit.teacher.captured import ROWS, Engine, shards_of


def test_a_first_shard_of_nan_is_a_broken_teacher_and_no_lost_engine() -> None:
    """A lost engine counts as a try of the shard; a teacher that never was right does not."""
    rows = shards_of(2)[0].requests()
    others = shards_of(2)[1].requests()
    engine = Engine(nan=[request.sample_id for request in [*rows, *others]])
    guarded = GuardedEngine(engine, tries=2, witnesses=lambda: others)
    with pytest.raises(ModelError, match="answers for no row") as caught:
        guarded.capture(rows)
    assert not isinstance(caught.value, EngineLost)
    # The same engine after it has answered once is lost.
    engine.nan.clear()
    guarded.capture(rows)
    engine.nan |= {request.sample_id for request in [*rows, *others]}
    with pytest.raises(EngineLost):
        guarded.capture(rows)


def test_tokens_are_reported_once_however_often_they_are_computed() -> None:
    class Flaky(Engine):
        def capture(self, requests: Any, *, on_tokens: Any = None) -> Any:
            if self.calls < 2:
                self.calls += 1
                on_tokens(20)
                raise RuntimeError("in passing")
            return super().capture(requests, on_tokens=on_tokens)

    reported: list[int] = []
    guarded = GuardedEngine(Flaky(), tries=3, witnesses=list)
    answered = guarded.capture(shards_of(1)[0].requests(), on_tokens=reported.append)
    assert answered.quarantined == ()
    assert reported == [20, 10]


def test_an_engine_that_fails_only_for_all_rows_is_said_so() -> None:
    class Small(Engine):
        def capture(self, requests: Any, *, on_tokens: Any = None) -> Any:
            if len(requests) == ROWS:
                raise RuntimeError("out of memory")
            return super().capture(requests)

    guarded = GuardedEngine(Small(), tries=2, witnesses=list)
    with pytest.raises(ModelError, match=r"fails for 3 rows together.*out of memory.*lower"):
        guarded.capture(shards_of(1)[0].requests())


def test_nearly_no_token_is_padding_whatever_the_order() -> None:
    draw = np.random.default_rng(3)
    requests = [
        CaptureRequest(str(n), np.zeros(size, np.int32), np.zeros(1, np.int64))
        for n, size in enumerate(draw.integers(5, 400, 500))
    ]
    engine = TransformersEngine.__new__(TransformersEngine)
    engine._batch_tokens = 2048
    batches = list(engine._batches(requests))
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert padding_share(requests, batches) < 0.03
    in_order = [list(range(start, start + 5)) for start in range(0, 500, 5)]
    assert padding_share(requests, in_order) > 0.3


class Dies(Engine):
    """Raises for good once it has been given a certain row."""

    def __init__(self, deadly: str) -> None:
        super().__init__()
        self.deadly, self.dead = deadly, False

    def capture(self, requests: Any, *, on_tokens: Any = None) -> Any:
        self.calls += 1
        self.dead |= any(request.sample_id == self.deadly for request in requests)
        if self.dead:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return super().capture(requests, on_tokens=on_tokens)


def _many(count: int) -> list[CaptureRequest]:
    return [
        CaptureRequest(f"{n:032x}", np.arange(4, dtype=np.int32), np.arange(3))
        for n in range(count)
    ]


@pytest.mark.parametrize("others", [3, 0])
def test_a_dead_engine_is_noticed_before_its_rows_are_searched(others: int) -> None:
    rows = _many(2000)
    witnesses = [replace(row, sample_id=f"w{row.sample_id}") for row in rows[:others]]
    engine = Dies(rows[1500].sample_id)
    guarded = GuardedEngine(engine, tries=3, witnesses=lambda: witnesses)
    guarded.capture(_many(2))
    with pytest.raises(EngineLost, match="device-side assert"):
        guarded.capture(rows)
    assert engine.calls <= 20


def test_an_id_beyond_the_head_never_reaches_the_engine() -> None:
    rows = _many(3)
    for n, wrong in ((0, 32), (2, -1)):
        ids = rows[n].input_ids_L.copy()
        ids[2] = wrong
        rows[n] = replace(rows[n], input_ids_L=ids)
    engine = Dies("none")
    answered = GuardedEngine(engine, tries=2, witnesses=list).capture(rows)
    assert [row.sample_id for row in answered.quarantined] == [rows[0].row_id, rows[2].row_id]
    assert "token id 32 at position 2 is beyond the teacher's 32 rows" in (
        answered.quarantined[0].error
    )
    assert (len(answered.columns), engine.calls) == (1, 2)  # `Dies` counts a call twice


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_enough(bad: float) -> None:
    columns_NC = np.zeros((3, 4), np.float32)
    assert _not_finite(columns_NC) is None
    columns_NC[1, 2] = bad
    assert _not_finite(columns_NC) == "the logits of supervised position 1 are not finite"
