"""The embedded default applies where a run names nothing of its own, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.api.settings import StudentRun
from pipeline.config import parse_command
from pipeline.config.command import Command
from stages.cache_teacher import TeacherRun
from stages.defaults import STUDENT_DEFAULT, TEACHER_DEFAULT
from tests.conftest import Stage, Tiny


def _teacher(*argv: object) -> Command[TeacherRun]:
    words = list(map(str, argv))
    return parse_command(TeacherRun, words, prog="p", description="", default=TEACHER_DEFAULT)


def _student(*argv: object) -> Command[StudentRun]:
    words = list(map(str, argv))
    return parse_command(StudentRun, words, prog="p", description="", default=STUDENT_DEFAULT)


def _cache(folder: Path, teacher: str, source: str) -> Path:
    (folder / "_meta").mkdir(parents=True)
    identity = {"teacher": {"model": teacher}, "corpus": {"source": source}}
    (folder / "_meta/manifest.json").write_text(json.dumps({"identity": identity}))
    return folder


def test_nothing_of_the_default_gets_under_ones_own_run(tmp_path: Path) -> None:
    plain = TeacherRun()
    for named in (["--teacher_model", "x"], ["--dataset_name", "y.jsonl"]):
        run = _teacher(*named)
        assert run.default_file is None
        assert run.settings.corpus.num_samples is None
        assert run.settings.corpus.max_length == plain.corpus.max_length
        assert run.settings.capture == plain.capture
    file = tmp_path / "mine.yaml"
    file.write_text("corpus: {dataset_name: y.jsonl}\n")
    assert _teacher("--config", file).settings.corpus.num_samples is None


def test_where_nothing_is_named_the_default_is_below_files_and_flags(tmp_path: Path) -> None:
    run = _teacher()
    assert run.default_file is not None
    assert (run.settings.corpus.num_samples, run.settings.corpus.max_length) == (200, 160)
    assert "corpus.num_samples" not in run.given
    file = tmp_path / "mine.yaml"
    file.write_text("corpus: {num_samples: 50}\n")
    run = _teacher("--config", file, "--max_length", 99)
    assert (run.settings.corpus.num_samples, run.settings.corpus.max_length) == (50, 99)
    assert run.settings.capture.shard_tokens == 6000


@pytest.mark.parametrize(
    ("teacher", "source", "applies"),
    [("embedded", "embedded", True), ("embedded", "files/mine", False), ("x", "embedded", False)],
)
def test_the_default_student_is_for_the_default_cache(
    teacher: str, source: str, applies: bool, tmp_path: Path
) -> None:
    run = _student("--cache_dir", _cache(tmp_path / "cache", teacher, source))
    assert (run.default_file is not None) == applies
    assert (run.settings.student.keep_layers is not None) == applies
    assert (run.settings.data.pack_length == 256) == applies
    assert _student("--cache_dir", tmp_path / "none").default_file is not None
    named = _student("--cache_dir", tmp_path / "none", "--student_model", "x")
    assert named.settings.student.keep_layers is None


def test_a_cache_of_ones_own_needs_a_student_of_ones_own(
    tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    flags = ["--cache_dir", tiny_cache, "--output_dir", tmp_path / "student"]
    message = stage("train_student", flags).refused(2)
    assert message.startswith("student.model: not named; expected a student for the cache ")
    assert "give --student_model NAME_OR_FOLDER" in message
    assert not (tmp_path / "student").exists()


def test_half_of_it_named_is_said(tiny: Tiny, stage: Stage, tmp_path: Path) -> None:
    named = [
        "--teacher_model",
        tiny.teacher,
        "--teacher.engine",
        "transformers",
        "--max_length",
        64,
    ]
    flags = [*named, "--cache_dir", tmp_path / "cache", "--num_samples", 20, "--dry-run"]
    result = stage("cache_teacher", flags).ok()
    assert (
        "no data set is named (--dataset_name): the teacher reads the embedded text" in result.err
    )
