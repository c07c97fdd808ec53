"""Stage two goes on where it was stopped, to the same losses and the same weights, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.observe.metrics import read_metrics
from tests.conftest import Stage, Tiny, digests

WEIGHTS = "model/model.safetensors"


def _losses(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Return every record without what depends on the moment."""
    records = [record.without_timing() for record in read_metrics(folder / "metrics.jsonl")]
    return [(record.step, record.values) for record in records]


def _same_run(folder: Path, undisturbed: Path) -> None:
    assert _losses(folder) == _losses(undisturbed)
    ours, theirs = digests(folder), digests(undisturbed)
    for name in (WEIGHTS, "heldout-before.json", "heldout-after.json", "finished.json"):
        assert ours[name] == theirs[name], name
    assert {name for name in ours if name.startswith("model/")} == {
        name for name in theirs if name.startswith("model/")
    }


@pytest.fixture
def flags(tiny: Tiny, tiny_cache: Path, tmp_path: Path) -> list[Any]:
    return [*tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", tmp_path / "student"]


def test_the_undisturbed_run_is_whole(tiny_run: Path) -> None:
    steps = [step for step, values in _losses(tiny_run) if "train/loss" in values]
    assert steps == list(range(1, 13))
    assert [step for step, values in _losses(tiny_run) if "heldout/kl" in values] == [
        0,
        12,
    ]
    values = [values for _, values in _losses(tiny_run) if "train/loss" in values]
    tokens = np.cumsum([record["train/tokens"] for record in values]).tolist()
    assert [record["train/total_tokens"] for record in values] == tokens
    assert json.loads((tiny_run / "finished.json").read_text())["steps"] == 12
    kept = sorted(folder.name for folder in (tiny_run / "checkpoints").glob("step-*"))
    assert kept == ["step-00000008", "step-00000012"]


KILLS = {
    "before the first checkpoint": ("signal_at_step", 3, int(signal.SIGKILL)),
    "in the middle": ("signal_at_step", 7, int(signal.SIGKILL)),
    "weights saved, not yet marked": (
        "kill_before", "pipeline.student.training.checkpoint", "Checkpoints.mark_complete",
    ),
    "before the last evaluation": ("signal_at_step", 12, int(signal.SIGKILL)),
    "before the export": (
        "kill_before", "pipeline.student.output.publish", "Publisher.write_student"
    ),
    "while the student is written": ("kill_while_exporting",),
}  # fmt: skip


@pytest.mark.parametrize("instant", KILLS)
def test_killed_and_run_again(
    instant: str, flags: list[Any], tiny_run: Path, stage: Stage, tmp_path: Path
) -> None:
    assert stage("train_student", flags, hook=KILLS[instant]).code == -signal.SIGKILL
    assert not (tmp_path / "student/model").exists()
    result = stage("train_student", flags).ok()
    resumes = instant not in ("before the first checkpoint", "weights saved, not yet marked")
    assert ("resuming after step" in result.err) == resumes
    _same_run(tmp_path / "student", tiny_run)


def test_evaluations_along_the_way_change_nothing_and_outlive_a_kill(
    flags: list[Any], tiny_run: Path, stage: Stage, tmp_path: Path
) -> None:
    flags += ["--train.eval_steps", 3]
    stage("train_student", flags, hook=KILLS["in the middle"])
    stage("train_student", flags).ok()
    found = _losses(tmp_path / "student")
    assert [step for step, values in found if "heldout/perplexity" in values] == [0, 3, 6, 9, 12]
    learned = [
        (step, {key: value for key, value in values.items() if not key.startswith("heldout/")})
        for step, values in found
        if "train/loss" in values
    ]
    assert learned == [pair for pair in _losses(tiny_run) if "train/loss" in pair[1]]
    for name in (WEIGHTS, "heldout-before.json", "heldout-after.json"):
        assert digests(tmp_path / "student")[name] == digests(tiny_run)[name], name


def test_sigterm_saves_and_says_so(
    flags: list[Any], tiny_run: Path, stage: Stage, tmp_path: Path
) -> None:
    result = stage("train_student", flags, hook=("signal_at_step", 6, int(signal.SIGTERM)))
    message = result.refused(143)
    assert message.startswith("stopped by SIGTERM after step 6 of 12; run the same command again")
    assert (tmp_path / "student/checkpoints/step-00000006/complete.json").exists()
    result = stage("train_student", flags).ok()
    assert "resuming after step 6 of 12" in result.err
    _same_run(tmp_path / "student", tiny_run)


def test_ctrl_c_goes_on_from_the_last_checkpoint(
    flags: list[Any], tiny_run: Path, stage: Stage, tmp_path: Path
) -> None:
    result = stage("train_student", flags, hook=("signal_at_step", 7, int(signal.SIGINT)))
    assert result.refused(130) == "interrupted; the same command continues the run."
    assert "resuming after step 4 of 12" in stage("train_student", flags).ok().err
    _same_run(tmp_path / "student", tiny_run)


def test_a_finished_run_has_nothing_to_do(
    tiny: Tiny, tiny_cache: Path, tiny_run: Path, stage: Stage
) -> None:
    before = digests(tiny_run)
    flags = [*tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", tiny_run]
    # How often it is saved and logged does not make it another run.
    result = stage("train_student", [*flags, "--save_steps", "5", "--logging_steps", "2"]).ok()
    assert "holds the finished student of this run; nothing to train" in result.err
    assert f"student {tiny_run / 'model'}" in result.out
    assert digests(tiny_run) == before


def test_other_settings_are_refused_and_never_starts_anew(
    flags: list[Any], tiny_run: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(tiny_run, folder)
    before = digests(folder)
    changed = [*flags, "--learning_rate", "1e-3", "--alpha", "0.5"]
    message = stage("train_student", changed).refused(3)
    assert "a checkpoint of another run" in message
    assert "train.learning_rate: 0.003 there, 0.001 asked for" in message
    assert "loss.alpha: 1.0 there, 0.5 asked for" in message
    assert "choose another --output_dir" in message
    assert "\n" not in message.strip()
    assert digests(folder) == before
    # `never` throws the old run away, its initial weights included.
    changed = [*flags, "--student.keep_layers", "0,1", "--max_steps", "3"]
    again = stage("train_student", [*changed, "--resume_from_checkpoint", "never"]).ok()
    assert "resuming" not in again.err
    fresh = tmp_path / "fresh"
    stage("train_student", [*changed, "--output_dir", fresh]).ok()
    _same_run(folder, fresh)
    assert [step for step, _ in _losses(folder)] == [0, 1, 2, 3, 3]


def test_a_start_without_checkpoint_leaves_nothing_of_other_settings(
    flags: list[Any], stage: Stage, tmp_path: Path
) -> None:
    killed = stage("train_student", flags, hook=("signal_at_step", 2, int(signal.SIGKILL)))
    assert killed.code == -signal.SIGKILL
    changed = [*flags, "--student.keep_layers", "0,1", "--max_steps", "3"]
    stage("train_student", changed).ok()
    fresh = tmp_path / "fresh"
    stage("train_student", [*changed, "--output_dir", fresh]).ok()
    _same_run(tmp_path / "student", fresh)


def test_a_named_checkpoint_and_a_missing_one(
    flags: list[Any], tiny_run: Path, stage: Stage, tmp_path: Path
) -> None:
    named = tiny_run / "checkpoints/step-00000008"
    result = stage("train_student", [*flags, "--resume_from_checkpoint", named]).ok()
    assert "resuming after step 8 of 12" in result.err
    assert digests(tmp_path / "student")[WEIGHTS] == digests(tiny_run)[WEIGHTS]
    other = [*flags, "--output_dir", tmp_path / "other"]
    missing = tmp_path / "step-00000099"
    message = stage("train_student", [*other, "--resume_from_checkpoint", missing]).refused(3)
    assert message.startswith(f"{missing}: no complete checkpoint there; expected a folder")
    assert not (tmp_path / "other").exists()


def test_damaged_checkpoint_is_named(
    flags: list[Any], tiny_run: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(tiny_run, folder)
    (folder / "finished.json").unlink()
    for file in (folder / "checkpoints/step-00000012").glob("*.pt"):
        file.write_bytes(file.read_bytes()[:1000])
    message = stage("train_student", flags).refused(3)
    assert "step-00000012: cannot be loaded" in message
    assert "delete that folder to go on from the checkpoint before it" in message
    shutil.rmtree(folder / "checkpoints/step-00000012")
    assert "resuming after step 8" in stage("train_student", flags).ok().err
    _same_run(folder, tiny_run)


def test_full_disk(flags: list[Any], stage: Stage, tmp_path: Path) -> None:
    result = stage("train_student", flags, hook=("full_disk", "complete.json"))
    message = result.refused(4)
    assert "the disk is full" in message
    assert "run the same command again" in message
