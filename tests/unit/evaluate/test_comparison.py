"""Scores side by side: differences are paired by document where that can be, and say so."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluate.comparison import (
    KeptResults,
    ModelScores,
    differences,
    markdown_tables,
    terminal_tables,
)
from pipeline.evaluate.harness import HarnessRun
from pipeline.evaluate.scores import Measured, TaskScore, measured_scores
from pipeline.evaluate.task_files import Task, files_digest
from pipeline.storage import Store


def _measured(*values: float, metric: str = "acc", documents: str = "d") -> Measured:
    mean = sum(values) / len(values)
    score = TaskScore("words", "1", metric, "none", mean, 0.1, 0, len(values))
    return Measured(score, values, documents)


def test_a_difference_is_paired_by_document() -> None:
    """Models that err on the same documents differ by less than their own errors say."""
    ours, theirs = _measured(1, 1, 0, 1), _measured(1, 0, 0, 1)
    (gap,) = differences([ModelScores("student", "a", (ours,)), ModelScores("t", "b", (theirs,))])
    assert (gap.value, gap.documents) == (0.25, 4)
    gaps = [0, 1, 0, 0]
    variance = sum((value - 0.25) ** 2 for value in gaps) / 3
    assert gap.standard_error == pytest.approx(math.sqrt(variance / 4))


def test_a_difference_without_pairs_has_no_error() -> None:
    ours = _measured(1, 1, 0, 1)
    other_documents = _measured(1, 0, 0, 1, documents="e")
    no_mean = Measured(ours.score)
    for theirs in (other_documents, no_mean):
        models = [ModelScores("student", "a", (ours,)), ModelScores("t", "b", (theirs,))]
        (gap,) = differences(models)
        assert (gap.standard_error, gap.documents) == (None, 0)
    missing = ModelScores("t", "b", (_measured(1, 0, metric="f1"),))
    models = [ModelScores("student", "a", (ours,)), missing]
    assert differences(models) == []
    assert terminal_tables(models, []).splitlines()[1].split() == [
        "words", "acc", "0.7500", "±", "0.1000", "-",
    ]  # fmt: skip


def test_the_tables() -> None:
    models = [
        ModelScores("student", "a", (_measured(1, 1, 0, 1),)),
        ModelScores("teacher", "b", (_measured(1, 1, 1, 1),)),
    ]
    gaps = differences(models)
    text = terminal_tables(models, gaps).splitlines()
    assert text[0].split() == ["task", "metric", "student", "teacher"]
    assert text[3].split() == ["task", "metric", "student", "-", "teacher"]
    assert text[4].split()[2:] == ["-0.2500", "±", "0.2500"]
    card = markdown_tables(models, gaps)
    assert "| words | 1 | 4 | 0 | acc | 0.7500 ± 0.1000 | 1.0000 ± 0.1000 |" in card
    assert "| words | acc | -0.2500 ± 0.2500 |" in card


def _found(samples: list[dict[str, Any]], value: float) -> dict[str, Any]:
    return {
        "results": {"words": {"alias": "words", "acc,none": value, "acc_stderr,none": "N/A"}},
        "versions": {"words": 1},
        "n-shot": {"words": 0},
        "n-samples": {"words": {"original": 2, "effective": 2}},
        "samples": {"words": samples},
    }


def test_values_of_documents_are_kept_where_their_mean_is_the_score() -> None:
    samples = [
        {"doc_id": 1, "filter": "none", "acc": 1.0, "doc_hash": "b"},
        {"doc_id": 0, "filter": "none", "acc": 0.0, "doc_hash": "a"},
        {"doc_id": 0, "filter": "strict", "acc": 1.0, "doc_hash": "a"},
    ]
    (mean,) = measured_scores(_found(samples, 0.5))
    assert mean.values == (0.0, 1.0)
    assert mean.score.standard_error is None
    (other,) = measured_scores(_found(samples, 0.7))
    assert other.values == ()
    assert Measured.from_json(mean.to_json()) == mean


def test_results_are_kept_by_all_that_decides_them(tmp_path: Path) -> None:
    data, file = tmp_path / "words.jsonl", tmp_path / "words.yaml"
    data.write_text("{}\n")
    file.write_text(f"task: words\ndataset_kwargs:\n  data_files: {{test: {data}}}\n")
    kept, run = KeptResults(Store(str(tmp_path / "run"))), HarnessRun()

    def key(revision: str = "r", how: HarnessRun = run, dtype: str = "auto") -> str:
        task = Task("words", files_digest(file))
        return kept.key(revision, task, how, dtype=dtype, versions={"lm_eval": "1"})

    first = key()
    assert kept.get(first) is None
    kept.put(first, "m", Task("words", ""), [_measured(1, 0)])
    assert kept.get(first) == [_measured(1, 0)]
    assert key(how=HarnessRun(batch_size=1, device="cpu")) == first
    others = {key("s"), key(how=HarnessRun(limit=3)), key(dtype="float32")}
    data.write_text("{}\n{}\n")
    others.add(key())
    assert len(others) == 4
    assert first not in others
    (tmp_path / f"run/lm-eval/{first}.json").write_text("{")
    assert kept.get(first) is None
