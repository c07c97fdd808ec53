"""What eval-student says of a run's held-out text: distance and acceptance, each by its name."""

from __future__ import annotations

import json
from pathlib import Path

from stages.eval_student import _heldout_lines


def write(folder: Path, logged: str) -> None:
    scores = {
        "sample_ids": ["a", "b"], "loss_tokens": [10, 10],
        "sums": {"kl": [1.0, 2.0], "cross_entropy": [9.0, 8.0], "acceptance": [8.0, 9.0]},
        "confidence_bins": [],
    }  # fmt: skip
    (folder / "heldout-after.json").write_text(json.dumps(scores))
    line = {"step": 4, logged: 0.15}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_an_estimate_and_a_bound_have_two_names(tmp_path: Path) -> None:
    assert _heldout_lines(tmp_path) == []
    write(tmp_path, "heldout/kl")
    assert _heldout_lines(tmp_path) == [
        "student   held-out KL to the teacher: 0.150 ± 0.050 nats",
        "student   held-out Acceptance rate: 85.0 ± 5.0 %",
    ]
    write(tmp_path, "heldout/kl_bucketed")
    assert _heldout_lines(tmp_path) == [
        "student   held-out Bucketed KL: 0.150 ± 0.050 nats",
        "student   held-out Acceptance rate (bound): 85.0 ± 5.0 %",
    ]
