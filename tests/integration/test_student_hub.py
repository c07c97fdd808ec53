"""Pushes of students over real HTTP: at the end, with checkpoints, retried, refused, repeated."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Stage, Tiny, digests
from tests.hub_server import Hub, serve_hub
from tests.stage_runner import real_stage


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as served:
        yield served


def _dtypes(safetensors: bytes) -> set[str]:
    (length,) = struct.unpack("<Q", safetensors[:8])
    header = json.loads(safetensors[8 : 8 + length])
    return {value["dtype"] for name, value in header.items() if name != "__metadata__"}


def test_each_checkpoint_and_the_end(
    hub: Hub, tiny: Tiny, tiny_cache: Path, tiny_run: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    flags = [
        *tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", folder, "--save_location",
        "both", "--hub_location", "me/student", "--output.push_checkpoints",
        "--output.weights_dtype", "bfloat16",
    ]  # fmt: skip
    # The commit of the first checkpoint passes at its second attempt.
    hub.failing = [503]
    result = stage("train_student", flags, env=hub.env(), hook=("hub_at", hub.url, 0.3)).ok()
    messages = [message for message, _ in hub.commits]
    assert messages[-1] == "Upload the student"
    assert messages[:-1], "no checkpoint was pushed"
    assert set(messages[:-1]) <= {"Step 4", "Step 8"}
    pushed = hub.files
    assert pushed == {f.name: f.read_bytes() for f in (folder / "model").iterdir()}
    assert hub.tokens == {"Bearer hf_of_a_test"}
    assert _dtypes(pushed["model.safetensors"]) == {"BF16"}
    assert json.loads(pushed["config.json"])["dtype"] == "bfloat16"
    early = hub.commits[0][1]
    assert "**in training**: step 4 of 12" in early["README.md"].decode()
    assert early["model.safetensors"] != pushed["model.safetensors"]
    assert not list(folder.glob("*.partial"))
    assert "pushed to" in result.err
    # What is pushed beside the training changes nothing of it.
    card = pushed["README.md"].decode()
    assert 'from_pretrained("me/student")' in card
    assert "pretrained=me/student" in card
    assert "cast to bfloat16" in card
    for name in ("heldout-after.json", "heldout-before.json"):
        assert (folder / name).read_bytes() == (tiny_run / name).read_bytes()


def test_an_upload_that_fails_keeps_the_student_and_can_be_repeated(
    hub: Hub, tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    flags = [
        *tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", folder, "--save_location",
        "hub", "--hub_location", "me/student", "--max_steps", "2",
    ]  # fmt: skip
    # No right to write: one attempt, not five.
    hub.failing = [403]
    message = stage("train_student", flags, env=hub.env(), hook=("hub_at", hub.url)).refused(4)
    assert message.startswith("me/student: the student cannot be pushed (")
    assert f"the student is safe in {folder / 'model'}" in message
    repeat = f'make push-student ARGS="--output_dir {folder} --hub_location me/student"'
    assert repeat in message
    assert hub.attempts == 1
    before = digests(folder / "model")
    assert "model.safetensors" in before
    # What the message says to do, against a hub that is busy for a while.
    hub.failing = [429, 503]
    argv = ["--output_dir", folder, "--hub_location", "me/student"]
    result = real_stage("push_student", argv, env=hub.env()).ok()
    assert result.out.strip() == f"pushed to {hub.url}/me/student"
    assert hub.attempts == 4
    assert set(hub.files) == set(before)
    assert digests(folder / "model") == before
    # And the training command again pushes without training.
    again = stage("train_student", flags, env=hub.env(), hook=("hub_at", hub.url)).ok()
    assert "nothing to train" in again.err
    assert len(hub.commits) == 2


def test_what_is_refused_before_anything_is_trained(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    flags = [*tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", folder]
    push = [*flags, "--save_location", "hub", "--hub_location", "me/student"]
    message = stage(
        "train_student",
        push,
        env={"HF_TOKEN": ""},
        hook=("replace_name", "huggingface_hub.constants", "HF_TOKEN_PATH", str(tmp_path / "none")),
    ).refused(2)
    assert "asks for a push to the hub, but there is no token" in message
    assert "HF_TOKEN" in message
    message = stage("train_student", [*flags, "--hub_location", "a/b/c"]).refused(2)
    assert "output.hub_location: found 'a/b/c', expected a repository such as" in message
    message = stage("train_student", [*flags, "--output.push_checkpoints"]).refused(2)
    assert "output.push_checkpoints: found true with save_location local" in message
    assert not folder.exists()
    message = stage("push_student", ["--hub_location", "a b"]).refused(2)
    assert message.startswith("hub_location: found 'a b', expected a repository such as")
