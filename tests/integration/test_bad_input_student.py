"""What stage two refuses: one message with what was found, expected and to do; nothing written."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.api.settings import StudentRun
from pipeline.config import fingerprint
from pipeline.errors import ConfigError
from pipeline.student.inputs import open_inputs
from tests.conftest import Stage, Tiny, digests
from tests.tiny import make_teacher, make_tokenizer


@pytest.fixture
def refused(stage: Stage, tiny: Tiny, tiny_cache: Path, tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs stage two, sees it refuse, and returns the message."""

    def run(*flags: object, code: int, cache: Path = tiny_cache, **options: Any) -> str:
        folder = tmp_path / "student"
        before = digests(cache) if cache.exists() else {}
        command = [*tiny.stage_two, "--cache_dir", cache, "--output_dir", folder, *flags]
        message = stage("train_student", command, **options).refused(code)
        assert not folder.exists(), f"written: {sorted(folder.rglob('*'))}"
        assert (digests(cache) if cache.exists() else {}) == before
        return message

    return run


@pytest.fixture
def cache_copy(tiny_cache: Path, tmp_path: Path) -> Path:
    """Return a copy of the cache that a test may spoil."""
    return Path(shutil.copytree(tiny_cache, tmp_path / "cache"))


def test_unknown_names_and_bad_values_all_at_once(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"loss": {"tempreature": 2}, "teacher": {"model": "x"}}))
    message = refused("--config", file, "--alpha", "1.5", "--lr", "3", "--max_steps", "-1", code=2)
    assert message.startswith("5 mistakes in the configuration:")
    assert "--lr: unknown flag" in message
    assert "loss.tempreature: unknown field; did you mean loss.temperature?" in message
    # The student's stage has no teacher to be told of: the cache says what it is.
    assert "teacher: unknown field" in message
    assert "loss.alpha: found 1.5, expected less than or equal to 1" in message
    assert "train.max_steps: found -1, expected greater than or equal to 1" in message


def test_no_cache_and_no_student_at_once(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused("--student_model", "./nobody", code=3, cache=tmp_path / "nothing")
    assert message.startswith("2 reasons why this run cannot be:")
    assert f"{tmp_path / 'nothing'}" in message
    assert "student './nobody': no such folder" in message
    message = refused("--report_to", "wandb", code=2, cache=tmp_path / "nothing")
    assert f"{tmp_path / 'nothing'}" in message
    assert "wandb was asked for, but wandb is not installed" in message


def test_values_that_contradict_each_other(refused: Callable[..., str]) -> None:
    message = refused("--save_location", "hub", code=2)
    assert "save_location is hub, but hub_location names no repository" in message
    message = refused(
        "--student.reconstruct", "least_squares", "--student.keep_layers", "none", code=2
    )
    assert "without student.keep_layers" in message
    message = refused("--student.keep_layers", "0,9", code=2)
    assert "student.keep_layers: found [9]; expected layers below the model's 4" in message
    message = refused("--use_flash_attention", "--student.keep_layers", "none", code=2)
    assert "use_flash_attention" in message
    assert "--no-use_flash_attention" in message
    message = refused("--data.pack_length", "20", "--student.keep_layers", "none", code=2)
    assert "pack_length is 20, but the cache has a row of" in message


def test_a_pattern_that_matches_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    whole = ("--student.keep_layers", "none")
    message = refused("--student.freeze", "embed_tokns", *whole, code=2)
    assert "'embed_tokns' match no parameter; expected names such as" in message
    spectrum = tmp_path / "spectrum.yaml"
    spectrum.write_text("unfrozen_parameters:\n- layers.7.mlp\n")
    message = refused("--layers_to_unfreeze", spectrum, *whole, code=2)
    assert "'layers.7.mlp' match no parameter" in message
    message = refused("--layers_to_unfreeze", tmp_path / "no.yaml", *whole, code=2)
    assert "cannot be read" in message


def test_a_temperature_that_the_cache_does_not_hold(refused: Callable[..., str]) -> None:
    message = refused("--temperature", "3", code=2)
    assert message.startswith("loss.temperature: found 3; expected one that the cache holds: 1, 2;")
    assert "--capture.temperatures 1,2,3" in message
    assert "--loss.uncached_temperature self_normalised" in message
    message = refused("--temperature", "3", "--loss.tail", "control_variate", code=2)
    assert message.startswith("2 mistakes in the configuration:")
    assert "loss.tail: found control_variate with a top-k cache" in message


def test_no_cache_and_an_incomplete_one(
    refused: Callable[..., str], stage: Stage, tiny: Tiny, tmp_path: Path
) -> None:
    message = refused(code=3, cache=tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'}: no cache there" in message
    assert "run cache-teacher first" in message
    begun = tmp_path / "begun"
    killed = stage(
        "cache_teacher", [*tiny.stage_one, "--cache_dir", begun], hook=("kill_at_sync", 16)
    )
    assert killed.code == -signal.SIGKILL
    message = refused(code=3, cache=begun)
    assert "the cache is incomplete" in message
    assert "of 5 shards missing: train-0000" in message
    assert "run the same cache-teacher command again; it computes only what is missing" in message


def test_a_cache_of_a_newer_format(refused: Callable[..., str], cache_copy: Path) -> None:
    file = cache_copy / "_meta/manifest.json"
    data = json.loads(file.read_text())
    del data["manifest_sha256"]
    data["format_version"] = 99
    data["manifest_sha256"] = fingerprint(data)
    file.write_text(json.dumps(data))
    message = refused(code=3, cache=cache_copy)
    assert "a cache of format version 99; expected at most 1; upgrade this project" in message


def test_a_damaged_manifest_and_records(refused: Callable[..., str], cache_copy: Path) -> None:
    file = cache_copy / "_meta/manifest.json"
    good = file.read_bytes()
    file.write_bytes(good.replace(b'"top_k": 16', b'"top_k": 17'))
    message = refused(code=3, cache=cache_copy)
    assert "manifest.json: damaged (its checksum does not match)" in message
    file.write_bytes(good)
    (records,) = (cache_copy / "_meta/shards").glob("train-*")
    records.write_bytes(records.read_bytes()[:-1])
    message = refused(code=3, cache=cache_copy)
    assert f"{records}: records missing or damaged" in message
    assert "pipeline.cache repair" in message


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_shard_damaged_since(
    damage: str, stage: Stage, tiny: Tiny, cache_copy: Path, tmp_path: Path
) -> None:
    shard = cache_copy / "data/train/00002.parquet"
    if damage == "missing":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 4
        shard.write_bytes(bytes(data))
    flags = [*tiny.stage_two, "--cache_dir", cache_copy, "--output_dir", tmp_path / "student"]
    message = stage("train_student", flags).refused(3)
    assert "data/train/00002.parquet: shard damaged: " in message
    assert ("checksum" if damage == "flipped" else "missing") in message
    assert f"run python -m pipeline.cache repair {cache_copy}" in message
    assert not (tmp_path / "student/model").exists()
    # So does the command that made it, and the run then is the same as without the damage.
    stage("cache_teacher", [*tiny.stage_one, "--cache_dir", cache_copy, "--verify"]).ok()
    stage("train_student", flags).ok()


def test_a_student_of_another_tokenizer(
    refused: Callable[..., str], tiny: Tiny, tmp_path: Path
) -> None:
    other = make_teacher(tmp_path / "other", make_tokenizer(tiny.corpus, size=330), layers=2)
    flags = ("--student_model", other, "--student.keep_layers", "none")
    message = refused(*flags, code=3)
    assert "the student's tokenizer differs from the cache's: " in message
    assert "missing (such as" in message
    assert "expected the same" in message
    assert "choose a student of the teacher's family" in message


def test_a_student_that_is_none(refused: Callable[..., str], tiny: Tiny, tmp_path: Path) -> None:
    message = refused("--student_model", tmp_path / "nowhere", code=3)
    assert message.startswith(f"student '{tmp_path / 'nowhere'}': no such folder")
    copy = Path(shutil.copytree(tiny.teacher, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    message = refused("--student_model", copy, code=3)
    assert "its config.json names LlamaModel; expected a causal language model" in message
    (copy / "config.json").write_text(json.dumps(config))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    message = refused("--student_model", copy, "--student.keep_layers", "none", code=3)
    assert f"{copy}: transformers cannot load it" in message


def test_too_little_memory_and_disk(refused: Callable[..., str]) -> None:
    message = refused(code=4, hook=("little_memory", 1 << 29))
    assert "training needs about" in message
    assert "512 MiB are free" in message
    assert "use a smaller student" in message
    message = refused(code=4, hook=("little_disk", 1000))
    assert "checkpoints need about" in message
    assert "--output_dir" in message


def test_half_of_a_launcher(refused: Callable[..., str]) -> None:
    message = refused(code=2, env={"RANK": "0", "WORLD_SIZE": "2"})
    assert "the launcher set RANK, WORLD_SIZE but not LOCAL_RANK" in message


@pytest.mark.parametrize("wrong", [True, False])
def test_a_run_that_is_refused_downloads_no_weights(
    tiny: Tiny, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    import huggingface_hub

    fetched: list[str] = []

    def download(_: str, *, allow_patterns: list[str], **__: Any) -> str:
        fetched.extend(allow_patterns)
        folder = tmp_path / "hub"
        folder.mkdir(exist_ok=True)
        for file in (f for pattern in allow_patterns for f in tiny.teacher.glob(pattern)):
            shutil.copy(file, folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = StudentRun.model_validate(
        {
            "cache_dir": str(tiny_cache),
            "student": {"model": "someone/student"},
            "loss": {"temperature": 3 if wrong else 1},
            "output": {"output_dir": str(tmp_path / "student")},
            "observe": {"report_to": ("wandb",) if wrong else ()},
        }
    )
    if not wrong:
        assert open_inputs(run).source.weight_bytes > 0
        return
    with pytest.raises(ConfigError) as caught:
        open_inputs(run)
    loss, tracker = caught.value.mistakes
    assert "report_to: wandb was asked for, but wandb is not installed" in tracker
    assert "temperature" in loss
    assert "*.json" in fetched, "its tokenizer and its config are looked at"
    assert "*.safetensors" not in fetched
