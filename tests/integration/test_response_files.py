"""The files of responses: kept, made again when damaged, known to `verify`, left out where lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.tools.verify import verify_cache
from pipeline.storage import Store
from tests.conftest import Stage
from tests.responses import RESPONSES, cached_rows, content_digests, response_rows


@pytest.mark.parametrize(
    "damage",
    [
        "shards lost",
        "plan of the responses lost",
        pytest.param("manifest lost", marks=pytest.mark.slow),
        "units lost",
        "samples of a unit damaged",
    ],
)
def test_responses_that_are_there_are_not_written_again(
    damage: str, writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    match damage:
        case "shards lost":
            shutil.rmtree(folder / "data")
        case "plan of the responses lost":
            (folder / RESPONSES / "plan.json").unlink()
        case "units lost":
            shutil.rmtree(folder / RESPONSES / "units")
            shutil.rmtree(folder / "_meta/corpus")
            (folder / "_meta/manifest.json").unlink()
        case "samples of a unit damaged":
            (folder / RESPONSES / "units/tokens/00002-0.parquet").write_bytes(b"cut")
            shutil.rmtree(folder / "data")
        case _:
            (folder / "_meta/manifest.json").unlink()
            (folder / "_meta/plan.json").unlink()
    stage("cache_teacher", [*writing, "--cache_dir", folder], hook=("forbid_writing",)).ok()
    assert content_digests(folder) == content_digests(written)


@pytest.mark.parametrize(
    "damage",
    ["deleted", "flipped", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cut", "empty"))],
)
def test_a_damaged_file_of_responses_is_written_again_to_the_same_bytes(
    damage: str, writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    file = folder / RESPONSES / "00001.parquet"
    data = file.read_bytes()
    half = len(data) // 3  # in the middle of the text
    match damage:
        case "deleted":
            file.unlink()
        case "flipped":
            file.write_bytes(data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :])
        case "cut":
            file.write_bytes(data[:half])
        case _:
            file.write_bytes(b"")
    others = folder / RESPONSES / "00000.parquet"
    stamp = others.stat().st_mtime_ns
    # Of a complete cache a missing file is noticed at once, a damaged one where that is asked for.
    asked = [] if damage == "deleted" else ["--verify"]
    result = stage("cache_teacher", [*writing, "--cache_dir", folder, *asked]).ok()
    assert ("damaged; written again" in result.err) == (damage != "deleted")
    assert content_digests(folder) == content_digests(written)
    assert others.stat().st_mtime_ns == stamp


def test_verify_knows_the_files_of_responses(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    assert verify_cache(Store(str(folder))) == []
    file = folder / RESPONSES / "00001.parquet"
    data = file.read_bytes()
    file.write_bytes(data[:99] + bytes([data[99] ^ 1]) + data[100:])
    (folder / RESPONSES / "00000.parquet").unlink()
    found = {finding.name: finding.reason for finding in verify_cache(Store(str(folder)))}
    assert found == {
        f"{RESPONSES}/00000.parquet": "missing",
        f"{RESPONSES}/00001.parquet": "damaged (its checksum does not match)",
    }


def test_responses_that_cannot_be_written_are_left_out(
    writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    names = list(response_rows(written))
    lost = [names[3], names[30]]
    folder = tmp_path / "cache"
    every = [*writing, "--cache_dir", folder, "--capture.max_quarantined_fraction", "0.03"]
    result = stage("cache_teacher", every, hook=("unanswered", lost))
    message = result.refused(3)
    assert "complete but for 2 responses, which the teacher could not write" in message
    assert f"  - sample {lost[0]} (responses/00000), 3 tries: RuntimeError: index out" in message
    assert "another --cache_dir has those prompts tried again" in message
    assert set(cached_rows(folder)) == set(cached_rows(written)) - set(lost)
    assert verify_cache(Store(str(folder))) == []
    before = content_digests(folder)
    again = stage("cache_teacher", every, hook=("forbid_loading",))
    assert again.refused(3) == message
    assert content_digests(folder) == before
    # Three are too many for this share: said after all others are written, before the capture.
    many = tmp_path / "many"
    every[every.index(folder)] = many
    result = stage("cache_teacher", every, hook=("unanswered", [*lost, names[31]]))
    assert "3 of 72 responses could not be written" in result.refused(3)
    assert not (many / "data").exists()


def test_responses_that_come_out_otherwise_are_refused(
    writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    (folder / RESPONSES / "00001.parquet").unlink()
    result = stage("cache_teacher", [*writing, "--cache_dir", folder], hook=("other_draws",))
    message = result.refused(3)
    assert "responses that were lost and written again came out otherwise" in message
    assert "bring them back, or delete that cache" in message
    shards = {
        name: value for name, value in content_digests(folder).items() if name.startswith("data/")
    }
    assert shards
    assert shards.items() <= content_digests(written).items()
