"""A teacher that two processes of vLLM share, here two halves of a CPU, captures the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Tiny
from tests.stage_runner import run_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_two_tensor_parallel_ranks_agree_with_transformers(tiny: Tiny, tmp_path: Path) -> None:
    """Each rank holds half of every layer and of the head; prefills are cut."""
    draw = np.random.default_rng(5)
    requests = [
        (draw.integers(3, 300, size).tolist(), list(range(0, size - 1, 2)))
        for size in (2, 64, 100, 17, 40)
    ]
    jobs = {
        "two": {"engine": "vllm", "batch_tokens": 128, "tensor_parallel_size": 2},
        "one": {"engine": "transformers"},
    }
    found = {}
    for name, teacher in jobs.items():
        plan = {
            "folder": str(tiny.teacher), "out": str(tmp_path), "top_k": 20,
            "temperatures": [1.0, 2.0], "max_length": 120, "requests": requests,
            "jobs": [{"name": name, "teacher": teacher, "runs": 2, "head_rows": 7}],
        }  # fmt: skip
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        result = run_python(["-m", "tests.capture_once", tmp_path / "plan.json"], timeout=600).ok()
        assert "CAPTURED" in result.out
        runs = [np.load(tmp_path / f"{name}-{run}.npz") for run in (0, 1)]
        columns = [np.concatenate([run[str(n)] for n in range(len(requests))]) for run in runs]
        np.testing.assert_array_equal(*columns)
        found[name] = columns[0]
    # Label log-prob, tail, log Z and entropies; entries may be in another order where they tie.
    np.testing.assert_allclose(found["two"][:, :6], found["one"][:, :6], atol=1e-3)
