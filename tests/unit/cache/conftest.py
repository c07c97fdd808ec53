"""A small complete cache for the tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.unit.cache.sample_cache import write_cache


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "cache"
    write_cache(str(folder))
    return folder


@pytest.fixture
def cache_dir(made: Path, tmp_path: Path) -> Path:
    """Return a copy that the test may damage."""
    return Path(shutil.copytree(made, tmp_path / "cache"))
