"""eval-student: real runs of lm-evaluation-harness on a local task, with tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.conftest import Stage, Tiny

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


@pytest.fixture
def distilled(tiny_run: Path, tmp_path: Path) -> Path:
    """Return the student of a run as `make distill` lays it out, a control beside it."""
    student = Path(shutil.copytree(tiny_run, tmp_path / "run/student"))
    control = tmp_path / "run/control/model"
    shutil.copytree(tiny_run / "init", control)
    return student


def test_models_side_by_side(
    distilled: Path, task: Path, tiny: Tiny, stage: Stage, tmp_path: Path
) -> None:
    run = distilled
    card = (run / "model/README.md").read_text()
    env = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    flags = ["--output_dir", run, "--batch_size", "4"]
    result = stage("eval_student", [*flags, "--tasks", task], env=env).ok()
    data = json.loads((run / "lm-eval.json").read_text())
    assert data["versions"].keys() == {"lm_eval", "transformers"}
    folders = {
        "student": run / "model",
        "before": run / "init",
        "control": run.parent / "control/model",
        "teacher": tiny.teacher,
    }
    assert [model["name"] for model in data["models"]] == list(folders)
    values = {}
    for model in data["models"]:
        (score,) = model["scores"]
        assert model["source"] == str(folders[model["name"]])
        assert (score["task"], score["metric"]) == ("tiny_words", "acc")
        assert score["examples"] == len(QUESTIONS)
        assert score["value"] == _accuracy(folders[model["name"]])
        values[model["name"]] = f"{score['value']:.4f}"
    for gap in data["differences"]:
        assert gap["documents"] == len(QUESTIONS)
        assert gap["value"] == pytest.approx(
            float(values["student"]) - float(values[gap["other"]]), abs=1e-4
        )
    assert [gap["other"] for gap in data["differences"]] == ["before", "control", "teacher"]
    # The control of this test is the student before: the very same differences and errors.
    before, control, _ = data["differences"]
    assert (before["value"], before["standard_error"]) == (
        control["value"], control["standard_error"]
    )  # fmt: skip
    heads, line = result.out.split("\n\n")[1].splitlines()
    assert heads.split() == ["task", "metric", *folders]
    assert line.split()[:3] == ["tiny_words", "acc", values["student"]]
    assert "student - teacher" in result.out
    with_table = (run / "model/README.md").read_text()
    row = f"| tiny_words | 1.0 | {len(QUESTIONS)} | 0 | acc | {values['student']} ± "
    assert with_table.count(row) == 1
    assert with_table.index("## Held-out measures") < with_table.index(row)
    assert with_table.index(row) < with_table.index("## Use")
    assert "| student - before | student - control | student - teacher |" in with_table
    assert set(card.splitlines()) < set(with_table.splitlines())
    # Again: nothing is measured, and the same is written.
    again = stage("eval_student", [*flags, "--tasks", task], env=env).ok()
    assert again.out.count("measured before") == 4
    assert json.loads((run / "lm-eval.json").read_text()) == data
    assert (run / "model/README.md").read_text() == with_table
    # By its folder and with fewer examples: the table is replaced, not repeated.
    few = [*flags, "--tasks", task.parent, "--limit", "2", "--without", "before,control,teacher"]
    assert "measured before" not in stage("eval_student", few, env=env).ok().out
    alone = (run / "model/README.md").read_text()
    assert alone.count("## Tasks") == 1
    assert "| tiny_words | 1.0 | 2 | 0 | acc | " in alone
    assert row not in alone
    assert "student - " not in alone


def test_a_model_that_is_not_there_is_told_first(
    distilled: Path, task: Path, stage: Stage, tmp_path: Path
) -> None:
    config = distilled / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["cache_dir"] = str(tmp_path / "gone")
    config.write_text(yaml.safe_dump(settings))
    flags = ["--output_dir", distilled, "--tasks", task]
    flags += ["--compare", f"other={tmp_path}/none,big=some-lab/some-70B"]
    message = stage("eval_student", flags).refused(3)
    assert f"teacher: {tmp_path / 'gone'}: no complete cache" in message
    assert f"other '{tmp_path}/none': no such folder" in message
    assert "big 'some-lab/some-70B': not on this machine" in message
    assert "--without teacher,other,big" in message
    assert not (distilled / "lm-eval.json").exists()
    assert not (distilled / "lm-eval").exists()
    wrong = [
        "--output_dir",
        distilled,
        "--tasks",
        task,
        "--compare",
        "control",
        "--without",
        "teachr",
    ]
    message = stage("eval_student", wrong).refused(2)
    assert "compare: found control, expected NAME=FOLDER_OR_HUB_ID" in message
    assert "without: found teachr" in message
    assert "did you mean teacher?" in message


def test_what_is_no_task(tiny_run: Path, stage: Stage, task: Path, tmp_path: Path) -> None:
    flags = ["--output_dir", tiny_run, "--without", "before,teacher"]
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
    assert "the harness cannot run it" in message
    assert "gone.jsonl" in message
    assert not (tiny_run / "lm-eval.json").exists()


@pytest.mark.slow
def test_a_name_that_the_harness_does_not_have(tiny_run: Path, stage: Stage) -> None:
    flags = ["--output_dir", tiny_run, "--tasks", "hellaswg"]
    message = stage("eval_student", flags).refused(2)
    assert "tasks: hellaswg is no task of the harness; did you mean hellaswag?" in message
