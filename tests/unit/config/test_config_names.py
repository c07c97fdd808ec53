"""What a field may be called on the command line, and what a wrong name is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.api.settings import StudentRun, TeacherRun
from pipeline.config import fields as fields_module
from pipeline.config import parse_command
from pipeline.config.fields import leaves, names_of, usual_name
from pipeline.errors import ConfigError


def _flag_mistakes(model: type[Any], *argv: str, other: type[Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_command(
            model, argv, prog="p", description="", elsewhere={"the other": other} if other else None
        )
    return str(caught.value)


def test_a_last_part_that_only_one_field_has_is_a_flag() -> None:
    run = parse_command(
        TeacherRun, ["--heldout_fraction", "0.1", "--batch-tokens", "64"], prog="p", description=""
    ).settings
    assert (run.corpus.heldout_fraction, run.teacher.batch_tokens) == (0.1, 64)
    given = parse_command(
        StudentRun, ["--keep_layers", "0,3", "--freeze", "x"], prog="p", description=""
    ).given
    assert given == {"student.keep_layers", "student.freeze"}


def test_a_last_part_of_several_fields_names_them_all() -> None:
    said = _flag_mistakes(TeacherRun, "--top_k", "32")
    assert "did you mean --generate.top_k or --capture.top_k?" in said


@pytest.mark.parametrize(
    ("habit", "ours"),
    [
        ("lr", "learning_rate"), ("epochs", "num_train_epochs"),
        ("batch_size", "per_device_train_batch_size"), ("output", "output_dir"),
        ("kd_ratio", "alpha"), ("save_every", "save_steps"),
    ],
)  # fmt: skip
def test_habits_of_other_trainers_are_answered(habit: str, ours: str) -> None:
    assert f"--{habit}: unknown flag; did you mean --{ours}?" in _flag_mistakes(
        StudentRun, f"--{habit}", "1", other=TeacherRun
    )
    if ours != "output_dir":
        said = _flag_mistakes(TeacherRun, f"--{habit}", "1", other=StudentRun)
        assert f"--{habit}: unknown flag here; it belongs to the other" in said


def test_every_habit_leads_to_a_field() -> None:
    names = {**names_of([*leaves(TeacherRun)]), **names_of([*leaves(StudentRun)])}
    last = {name.rsplit(".", 1)[-1] for name in names}
    assert {usual_name(habit) for habit in fields_module._HABITS} <= last


def _file_mistakes(model: type[Any], other: type[Any], tmp_path: Path, text: str) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return _flag_mistakes(model, "--config", str(file), other=other)


def test_a_field_of_a_section_is_sought_in_that_section(tmp_path: Path) -> None:
    said = _file_mistakes(
        StudentRun, TeacherRun, tmp_path, "train: {lr: 1, bogus: 2, max_step: 3}\ntrian: 4\n"
    )
    assert "train.lr: unknown field; did you mean train.learning_rate?" in said
    assert "train.bogus: unknown field\n" in said
    assert "train.max_step: unknown field; did you mean train.max_steps?" in said
    assert "trian: unknown field; did you mean train?" in said


def test_a_section_of_the_other_stage_is_named_in_a_file(tmp_path: Path) -> None:
    said = _file_mistakes(
        TeacherRun,
        StudentRun,
        tmp_path,
        "train: {learning_rate: 1}\nloss: {alpha: 1}\nsamples: 3\n",
    )
    assert "train: unknown field here; it belongs to the other" in said
    assert "loss: unknown field here; it belongs to the other" in said
    assert "tries" not in said


def test_a_near_name_of_several_fields_names_them_all() -> None:
    said = _flag_mistakes(TeacherRun, "--topk", "32")
    assert "did you mean --generate.top_k or --capture.top_k?" in said


def test_the_section_may_be_misspelt() -> None:
    said = _flag_mistakes(TeacherRun, "--teachr.model", "x", "--teacher.modle", "x")
    assert said.count("did you mean --teacher.model?") == 2
