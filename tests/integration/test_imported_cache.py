"""A cache made from plain lists is verified, trained from, and refused at temperature 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import open_cache
from pipeline.cache.tools.verify import verify_cache
from pipeline.storage import Store
from tests.conftest import Stage, Tiny


@pytest.mark.slow
def test_an_imported_cache_trains(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    main(["export", str(tiny_cache), str(tmp_path / "plain")])
    cache = tmp_path / "imported"
    assert main([
        "import", str(tmp_path / "plain/data"), str(cache), "--format", "plain", "--tokenizer",
        str(tiny.teacher), "--teacher", "tiny", "--heldout-fraction", "0.2",
    ]) == 0  # fmt: skip
    assert verify_cache(Store(str(cache)), check="decode") == []
    own = open_cache(str(tiny_cache)).manifest.identity
    identity = open_cache(str(cache)).manifest.identity
    assert identity["tokenizer"] == own["tokenizer"]
    flags = [
        *tiny.stage_two, "--cache_dir", cache, "--output_dir", tmp_path / "student",
        "--max_steps", "3",
    ]  # fmt: skip
    stage("train_student", flags).ok()
    assert (tmp_path / "student/model/config.json").exists()
    message = stage("train_student", [*flags, "--temperature", "2"]).refused(2)
    assert "loss.temperature: found 2; expected one that the cache holds: 1" in message
