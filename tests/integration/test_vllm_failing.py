"""A step of vLLM that raises costs the call, not the engine: the next call gives the usual bits."""

from __future__ import annotations

import pytest

from tests.conftest import Tiny
from tests.stage_runner import run_python

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from pipeline.teacher.engines.base import CaptureRequest
from pipeline.teacher.engines.registry import open_engine
from pipeline.teacher.fleet.quarantine import GuardedEngine
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme

draw = np.random.default_rng(5)
requests = [
    CaptureRequest(str(n), draw.integers(3, 300, size).astype(np.int32), np.arange(size - 1))
    for n, size in enumerate((90, 17, 64, 100, 40, 9, 71, 30))
]
folder = Path(sys.argv[1])
engine = open_engine(
    TeacherSettings(model=str(folder), kv_cache_gib=0.25, batch_tokens=128),
    CaptureSettings(top_k=20, temperatures=(1.0, 2.0)),
    folder=folder, scheme=SparseScheme(20, (1.0, 2.0)), max_length=120,
)
usual = engine.capture(requests)
from pipeline.teacher.engines.vllm_pooler import CapturePooler

real, calls = CapturePooler._columns, iter(range(1, 10**6))


def fails_at(number):
    def columns(self, *args):
        if next(calls) == number:
            raise RuntimeError("a step failed")
        return real(self, *args)
    CapturePooler._columns = columns


fails_at(3)
try:
    engine.capture(requests)
    raise SystemExit("the step did not fail")
except RuntimeError as error:
    assert "a step failed" in str(error), error
again = engine.capture(requests)
assert len(again) == len(usual)
assert all(np.array_equal(a, b) for a, b in zip(usual, again))


def poisoned(self, hidden, rows, label, *others):
    if rows.numel() and hidden.shape[0] and bool((label == poison).any()):
        raise RuntimeError("no such token")
    return real(self, hidden, rows, label, *others)


# A token that only one sequence has; found by halving, the others answered as if it were not there.
others = set(np.concatenate([r.input_ids_L for n, r in enumerate(requests) if n != 4]).tolist())
poison = next(t for t in requests[4].input_ids_L[1:].tolist() if t not in others)
CapturePooler._columns = poisoned
answered = GuardedEngine(engine, tries=2, witnesses=lambda: []).capture(requests)
assert [row.sample_id for row in answered.quarantined] == ["4"], answered.quarantined
CapturePooler._columns = real
without = engine.capture([r for r in requests if r.sample_id != "4"])
assert all(np.array_equal(a, b) for a, b in zip(answered.columns, without))
print("GOES ON")
"""


def test_a_step_that_fails_leaves_nothing_behind(tiny: Tiny) -> None:
    result = run_python(["-c", SCRIPT, tiny.teacher], timeout=280).ok()
    assert "GOES ON" in result.out
