"""A tiny teacher that writes, for every test that lets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Tiny
from tests.tiny import TALKER_ENDS


@pytest.fixture(scope="session")
def talker(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny teacher with so many end tokens that many of its responses end."""
    folder = tmp_path_factory.mktemp("talker") / "teacher"
    shutil.copytree(tiny.teacher, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": TALKER_ENDS}))
    return folder
