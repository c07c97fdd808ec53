"""vLLM's capture is transformers' capture: the same ids, log-probabilities, normalisers, entropies.

Six captures in one process of vLLM, one of transformers, then the numbers side by side.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import Tiny
from tests.stage_runner import run_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOP_K, GRID = 20, (1.0, 2.0)
LONGEST = 120


class Captured:
    """The columns of all requests of one job, by their meaning."""

    def __init__(self, file: Path, grid: tuple[float, ...]) -> None:
        with np.load(file) as data:
            columns = np.concatenate([data[str(n)] for n in range(len(data.files))])
        size = len(grid)
        self.columns: NDArray[np.float32] = columns
        self.label, self.tail = columns[:, 0], columns[:, 1]
        self.log_z = columns[:, 2 : 2 + size]
        self.entropy = columns[:, 2 + size : 2 + 2 * size]
        ids = columns[:, 2 + 2 * size : 2 + 2 * size + TOP_K].astype(int)
        logprobs = columns[:, 2 + 2 * size + TOP_K :]
        order = np.argsort(ids, axis=1)
        self.ids = np.take_along_axis(ids, order, 1)
        self.logprobs = np.take_along_axis(logprobs, order, 1)


def _requests(vocabulary: int) -> list[tuple[list[int], list[int]]]:
    draw = np.random.default_rng(5)
    requests = []
    for length in (2, 3, 17, 64, 100, LONGEST, 40, 9):
        ids = draw.integers(3, vocabulary, length).tolist()
        rows = sorted(draw.choice(length - 1, max(1, length // 2), replace=False).tolist())
        requests.append((ids, rows))
    requests[3] = (requests[3][0], list(range(63)))  # every row of one
    return requests


@pytest.fixture(scope="module", params=["tiny", "embedded"])
def captured(
    request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Captured]:
    if request.param == "tiny":
        folder, vocabulary = tiny.teacher, 300
    else:
        from pipeline.models.resolve import resolve_model

        folder, vocabulary = resolve_model("embedded", role="teacher").path, 49152
    out = tmp_path_factory.mktemp(f"captured-{request.param}")
    vllm: dict[str, Any] = {"engine": "vllm", "batch_tokens": 512}
    jobs: list[dict[str, Any]] = [
        {"name": "device", "teacher": vllm, "runs": 2},
        {"name": "chunked", "teacher": {**vllm, "batch_tokens": 128}, "head_rows": 7},
        {
            "name": "api",
            "teacher": {**vllm, "capture_path": "prompt_logprobs"},
            "temperatures": [1.0],
        },
    ]
    reference = [{"name": "transformers", "teacher": {"engine": "transformers"}}]
    plan = {
        "folder": str(folder), "out": str(out), "top_k": TOP_K, "temperatures": GRID,
        "max_length": LONGEST, "requests": _requests(vocabulary),
    }  # fmt: skip
    # One process each: a second vLLM engine in a process finds the first one's world.
    for number, group in enumerate([*([job] for job in jobs), reference]):
        file = out / f"plan-{number}.json"
        file.write_text(json.dumps({**plan, "jobs": group}))
        result = run_python(["-m", "tests.capture_once", file], timeout=800).ok()
        assert "CAPTURED" in result.out
    names = {"device-0": GRID, "device-1": GRID, "chunked-0": GRID, "transformers-0": GRID}
    found = {name: Captured(out / f"{name}.npz", grid) for name, grid in names.items()}
    found["api-0"] = Captured(out / "api-0.npz", (1.0,))
    return found


def _same_ids(a: Captured, b: Captured) -> NDArray[np.bool_]:
    """Return where both kept the same tokens; elsewhere the last places must be a tie."""
    same = (a.ids == b.ids).all(axis=1)
    for row in np.flatnonzero(~same):
        assert a.logprobs[row].min() == pytest.approx(b.logprobs[row].min(), abs=1e-4)
        assert len(set(a.ids[row]) ^ set(b.ids[row])) <= 2
    assert same.mean() > 0.99
    return same


def test_vllm_agrees_with_transformers(captured: dict[str, Captured]) -> None:
    ours, theirs = captured["device-0"], captured["transformers-0"]
    same = _same_ids(ours, theirs)
    np.testing.assert_allclose(ours.logprobs[same], theirs.logprobs[same], atol=1e-3)
    np.testing.assert_allclose(ours.label, theirs.label, atol=1e-3)
    np.testing.assert_allclose(ours.tail, theirs.tail, atol=1e-3)
    np.testing.assert_allclose(ours.log_z, theirs.log_z, atol=1e-3)
    np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=1e-3)
    assert np.abs(ours.log_z[:, 0]).max() < 1e-5, "at temperature 1 the normaliser is 1"
    assert (ours.log_z[:, 1] > 0).all()


def test_the_device_path_agrees_with_prompt_logprobs(captured: dict[str, Captured]) -> None:
    ours, api = captured["device-0"], captured["api-0"]
    same = _same_ids(ours, api)
    np.testing.assert_allclose(ours.logprobs[same], api.logprobs[same], atol=1e-4)
    np.testing.assert_allclose(ours.label, api.label, atol=1e-4)
    np.testing.assert_allclose(ours.tail, api.tail, atol=1e-4)
    # Of the entries and one token for the rest: a weight by it is a weight, not zero everywhere.
    assert (api.entropy > 0).all()
    assert (api.entropy[same] <= ours.entropy[same, :1] + 1e-3).all()


def test_chunked_prefill_changes_nothing(captured: dict[str, Captured]) -> None:
    ours, chunked = captured["device-0"], captured["chunked-0"]
    same = _same_ids(ours, chunked)
    np.testing.assert_allclose(ours.logprobs[same], chunked.logprobs[same], atol=1e-4)
    np.testing.assert_allclose(ours.label, chunked.label, atol=1e-4)
    np.testing.assert_allclose(ours.entropy, chunked.entropy, atol=1e-3)


def test_the_same_call_gives_the_same_bits(captured: dict[str, Captured]) -> None:
    assert np.array_equal(captured["device-0"].columns, captured["device-1"].columns)
