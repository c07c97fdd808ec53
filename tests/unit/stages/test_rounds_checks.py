"""What rounds refuse before their first part, and the order of the parts before them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from stages.parts import Parts
from stages.rounds import main
from stages.steps import Steps

SAMPLED = "loss: {divergence: sampled_reverse_kl, temperature: 1.0}\n"


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    for name, content in {
        "teacher": "capture: {temperatures: [1.0]}\ngenerate: {temperature: 0.7}\n",
        "student": "loss: {temperature: 2.0}\n",
        "again": SAMPLED,
    }.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    files = {"teacher": "teacher", "student": "student", "round": "again"}
    named = [f"--{flag}_config={tmp_path / name}.yaml" for flag, name in files.items()]
    return ["--run_dir", str(tmp_path / "run"), *named]


def test_what_no_cache_of_the_rounds_could_serve(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        main([*flags, "--corpus_weight", "0.5", "--least_drift", "0.1"])
    message = str(caught.value)
    assert f"{tmp_path}/student.yaml: loss.temperature: found 2; expected one that" in message
    assert f"{tmp_path}/again.yaml: loss.divergence: found sampled_reverse_kl with" in message
    assert "least_drift: found 0.1 with a filter or a generate.temperature other than 1" in message
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_to_write_is_tried_before_the_corpus_is_read(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "again.yaml").write_text("loss: {temperature: 1.0}\n")
    assert main([*flags, "--start", "somebody", "--corpus_weight", "0.5", "--dry-run"]) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert titles[:3] == [
        "# before the first round: the student's own text on the held-out prompts",
        "# corpus: the teacher reads the corpus's own text",
        "# before the first round: the student's scores",
    ]


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    parts = Parts(Steps(tmp_path), of=1)
    with pytest.raises(ConfigError, match=r"/nowhere/python: cannot be started \(No such file"):
        parts.stage("a part", ["/nowhere/python", "-m", "stages.x"], "", tmp_path / "out")
