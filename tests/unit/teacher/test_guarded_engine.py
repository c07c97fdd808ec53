"""An engine that fails: what is tried again, what is lost; and how it batches rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.errors import ModelError
from pipeline.teacher.engines.base import CaptureRequest
from pipeline.teacher.engines.transformers import TransformersEngine, padding_share
from pipeline.teacher.fleet.quarantine import EngineLost, GuardedEngine
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
