"""What `--check` of stage two refuses, so that training does not die of it steps later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Stage, Tiny
from tests.other_vocabularies import permute_student

WHOLE = ("--student.keep_layers", "none")


@pytest.fixture
def check(stage: Stage, tiny: Tiny, tiny_cache: Path, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs stage two with `--check` into a folder of its own."""

    def run(*flags: object, folder: Path = tmp_path / "student", **options: Any) -> Any:
        command = [*tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", folder, *flags]
        return stage("train_student", [*command, "--check"], **options)

    return run


@pytest.fixture(scope="module")
def resized(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function that makes the tiny model with so many more rows than its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def make(more: int) -> Path:
        folder = tmp_path_factory.mktemp("resized") / "student"
        shutil.copytree(tiny.teacher, folder)
        model = AutoModelForCausalLM.from_pretrained(tiny.teacher, dtype=torch.float32)
        rows = len(AutoTokenizer.from_pretrained(tiny.teacher)) + more
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("across", ["reject", "uld"])
def test_a_head_one_row_short_of_its_tokenizer(
    across: str, check: Callable[..., Any], resized: Callable[[int], Path]
) -> None:
    mode = ("--loss.cross_tokenizer", across)
    student = resized(-1)
    message = check("--student_model", student, *mode).refused(3)
    assert f"{student}: its tokenizer gives token" in message
    assert "resize the student's embeddings to its tokenizer first" in message
    check("--student_model", resized(0), *mode).ok()
    check("--student_model", resized(7), *mode).ok()


def test_shuffled_ids_one_row_short(check: Callable[..., Any], tiny: Tiny, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "shuffled"
    permute_student(tiny.teacher, folder, padding=0)
    check("--student_model", folder).ok()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(model.config.vocab_size - 1)
    model.save_pretrained(folder)
    assert "its tokenizer gives token" in check("--student_model", folder).refused(3)


def test_all_that_a_run_asks_too_much_at_once(
    check: Callable[..., Any], tiny: Tiny, tmp_path: Path
) -> None:
    student = Path(shutil.copytree(tiny.teacher, tmp_path / "short"))
    file = student / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 24}))
    message = check(
        "--student_model", student, "--student.freeze", "layers.3.", "--temperature", "3",
        "--data.pack_length", "20", "--fp16", "--data.max_entries", "99",
    ).refused(2)  # fmt: skip
    assert message.startswith("7 mistakes in the configuration:"), message
    for part in (
        "loss.temperature: found 3", "entries", "fp16 on a machine without a GPU",
        "'layers.3.' match no parameter", "pack_length is 20, but the cache has a row of",
        "found 24 positions (max_position_embeddings), but the cache has a training row of",
        "found 24 positions (max_position_embeddings), but the cache has a held-out row of",
    ):  # fmt: skip
        assert part in message, part


def test_weights_that_were_not_copied_to_their_end(
    check: Callable[..., Any], tiny: Tiny, tmp_path: Path
) -> None:
    student = Path(shutil.copytree(tiny.teacher, tmp_path / "short"))
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    for layers in ((), WHOLE):
        message = check("--student_model", student, *layers).refused(3)
        assert f"{student}: transformers cannot load it (model.safetensors: " in message


def test_the_folder_of_another_run(
    check: Callable[..., Any], tiny_run: Path, tmp_path: Path
) -> None:
    message = check("--learning_rate", "1e-3", folder=tiny_run).refused(3)
    assert "a checkpoint of another run (train.learning_rate: 0.003 there, 0.001" in message
    assert "choose another --output_dir" in message
    check(folder=tiny_run).ok()
    message = check("--resume_from_checkpoint", tmp_path / "none").refused(3)
    assert f"{tmp_path / 'none'}: no complete checkpoint there" in message
    assert not (tmp_path / "student").exists()
    unreadable = Path(shutil.copytree(tiny_run, tmp_path / "unreadable"))
    (unreadable / "finished.json").unlink()
    (unreadable / "skipped-shards.json").write_text("{")
    assert "skipped-shards.json: not readable" in check(folder=unreadable).refused(3)
    # Two processes of half the packs make the same step; how many there will be is not known here.
    half = ("--per_device_train_batch_size", "1")
    check(*half, folder=tiny_run).ok()
    message = check("--per_device_train_batch_size", "3", folder=tiny_run).refused(3)
    assert "a step of that run, with 1 process, had 2 packs" in message


def test_what_the_machine_and_the_hub_lack(check: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    hub = ("--save_location", "hub", "--hub_location", "me/mine", "--report_to", "wandb")
    message = check(
        *hub, "--lr_scheduler_type", "polynomial", "--learning_rate", "1e-8", folder=file,
        env={"HF_HOME": str(tmp_path), "HF_TOKEN": ""},
    ).refused(2)  # fmt: skip
    assert message.startswith("4 mistakes in the configuration:"), message
    for part in ("there is no token", "wandb was asked for", "polynomial is refused", "is a file"):
        assert part in message, part
