"""eval-student: a real run of lm-evaluation-harness on a local task with the tiny student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Stage

TASK = """\
task: tiny_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
QUESTIONS = ["the list of", "read the file and", "returns the value when", "where keys are"]
CHOICES = [" numbers", " data", " an open file"]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Return a task file whose answers are the choices in turn."""
    data = tmp_path / "tasks/words.jsonl"
    data.parent.mkdir()
    lines = [
        json.dumps({"question": question, "choices": CHOICES, "answer": number % len(CHOICES)})
        for number, question in enumerate(QUESTIONS)
    ]
    data.write_text("\n".join(lines) + "\n")
    file = tmp_path / "tasks/words.yaml"
    file.write_text(TASK.format(data=data))
    return file


def _accuracy(folder: Path) -> float:
    """Return the share of questions whose answer the model finds likeliest, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = 0
    for number, question in enumerate(QUESTIONS):
        scores = []
        for choice in CHOICES:
            start = len(tokenizer(question).input_ids)
            ids = torch.tensor([tokenizer(question + choice).input_ids])
            with torch.no_grad():
                logprobs = model(ids).logits[0].log_softmax(-1)
            picked = logprobs[:-1].gather(1, ids[0, 1:, None])[start - 1 :]
            scores.append(float(picked.sum()))
        right += scores.index(max(scores)) == number % len(CHOICES)
    return right / len(QUESTIONS)


def test_a_local_task(tiny_run: Path, task: Path, stage: Stage, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "student"))
    card = (run / "model/README.md").read_text()
    env = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    flags = ["--output_dir", run, "--batch_size", "4"]
    result = stage("eval_student", [*flags, "--tasks", task], env=env).ok()
    data = json.loads((run / "lm-eval.json").read_text())
    (score,) = data["scores"]
    assert score["task"] == "tiny_words"
    assert score["metric"] == "acc"
    assert score["examples"] == len(QUESTIONS)
    assert score["value"] == _accuracy(run / "model")
    assert data["versions"].keys() == {"lm_eval", "transformers"}
    assert f"tiny_words\tacc\t{score['value']:.4f}" in result.out
    with_table = (run / "model/README.md").read_text()
    row = f"| tiny_words | 1.0 | {len(QUESTIONS)} | 0 | acc | {score['value']:.4f} ± "
    assert with_table.count(row) == 1
    assert with_table.index("## Held-out measures") < with_table.index(row)
    assert with_table.index(row) < with_table.index("## Use")
    assert set(card.splitlines()) < set(with_table.splitlines())
    # Again, by its folder and with fewer examples: the table is replaced, not repeated.
    stage("eval_student", [*flags, "--tasks", task.parent, "--limit", "2"], env=env).ok()
    again = (run / "model/README.md").read_text()
    assert again.count("## Tasks") == 1
    assert "| tiny_words | 1.0 | 2 | 0 | acc | " in again
    assert row not in again


def test_what_is_no_task(tiny_run: Path, stage: Stage, task: Path, tmp_path: Path) -> None:
    flags = ["--output_dir", tiny_run]
    message = stage("eval_student", [*flags, "--tasks", tmp_path / "no.yaml"]).refused(2)
    assert f"tasks: found {tmp_path / 'no.yaml'}, expected an existing YAML file" in message
    message = stage("eval_student", [*flags, "--tasks", "[]"]).refused(2)
    assert message.startswith("tasks: found none, expected at least one")
    empty = tmp_path / "empty.yaml"
    empty.write_text("model: x\n")
    message = stage("eval_student", [*flags, "--tasks", empty]).refused(2)
    assert f"{empty} defines no task" in message
    message = stage("eval_student", ["--output_dir", tmp_path, "--tasks", task]).refused(3)
    assert "no finished student" in message
    task.write_text(task.read_text().replace("words.jsonl", "gone.jsonl"))
    message = stage("eval_student", [*flags, "--tasks", task]).refused(3)
    assert "the harness cannot run them" in message
    assert "gone.jsonl" in message
    assert not (tiny_run / "lm-eval.json").exists()


@pytest.mark.slow
def test_a_name_that_the_harness_does_not_have(tiny_run: Path, stage: Stage) -> None:
    flags = ["--output_dir", tiny_run, "--tasks", "hellaswg"]
    message = stage("eval_student", flags).refused(2)
    assert "tasks: hellaswg is no task of the harness; did you mean hellaswag?" in message
