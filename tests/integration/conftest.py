"""A tiny teacher that writes, and the cache over what it wrote, for every test that asks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Stage, Tiny
from tests.tiny import TALKER_ENDS


@pytest.fixture(scope="session")
def talker(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny teacher with so many end tokens that many of its responses end."""
    folder = tmp_path_factory.mktemp("talker") / "teacher"
    shutil.copytree(tiny.teacher, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": TALKER_ENDS}))
    return folder


@pytest.fixture(scope="session")
def writing(tiny: Tiny, talker: Path) -> list[Any]:
    """Return the flags of a stage one whose teacher writes."""
    return [
        *tiny.stage_one, "--teacher_model", talker, "--num_samples", "36", "--generate.enabled",
        "--generate.max_new_tokens", "14", "--generate.prompt_tokens", "5",
        "--generate.temperature", "0.9", "--generate.top_p", "0.95", "--generate.responses", "2",
        "--generate.shard_prompts", "10", "--generate.record_logprobs", "--generate.record_top_k",
        "3",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def written(writing: list[Any], stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a complete cache over responses that one undisturbed worker wrote."""
    folder = tmp_path_factory.mktemp("written") / "cache"
    stage("cache_teacher", [*writing, "--cache_dir", folder]).ok()
    return folder
