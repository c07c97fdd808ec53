"""The files of responses: kept, made again when damaged, known to `verify`, left out where lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.tools.repair import plan_repair, repair_cache
from pipeline.cache.tools.verify import verify_cache
from pipeline.errors import CacheError
from pipeline.storage import Store
from tests.conftest import Stage, digests
from tests.responses import RESPONSES, cached_rows, content_digests, response_rows
from tests.unit.cache.planned_cache import flip


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


def test_a_file_of_responses_that_was_not_planned_is_named(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    shutil.copy(folder / RESPONSES / "00001.parquet", folder / RESPONSES / "00009.parquet")
    (found,) = verify_cache(Store(str(folder)))
    assert (found.name, found.stray) == (f"{RESPONSES}/00009.parquet", True)
    assert found.reason == "belongs to no shard of this cache"
    # Nothing vouches for the number in the plan, so no text is removed because of it.
    assert main(["repair", str(folder)]) == 0
    assert f"to be removed by hand: {RESPONSES}/00009.parquet" in capsys.readouterr().out
    (folder / RESPONSES / "plan.json").unlink()
    (found,) = verify_cache(Store(str(folder)))
    assert (found.name, found.reason) == (f"{RESPONSES}/plan.json", "missing")


def _flip(file: Path) -> None:
    flip(file, file.stat().st_size // 3)  # in the middle of the text


DAMAGES: dict[str, list[Callable[[Path], None]]] = {
    "a file": [lambda folder: _flip(folder / RESPONSES / "00001.parquet")],
    "a file and a shard": [
        lambda folder: _flip(folder / RESPONSES / "00001.parquet"),
        lambda folder: _flip(folder / "data/train/00000.parquet"),
    ],
    "the plan": [lambda folder: (folder / RESPONSES / "plan.json").write_bytes(b"{")],
}


@pytest.mark.parametrize("what", DAMAGES)
def test_repair_has_damaged_responses_made_again(
    what: str, written: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    for damage in DAMAGES[what]:
        damage(folder)
    store = Store(str(folder))
    damaged = digests(folder)
    failing = plan_repair(store, verify_cache(store))
    # What was there is there again when stage one fails.
    with pytest.raises(CacheError, match="stage one could not compute what is missing"):
        repair_cache(store, failing, lambda _: 3)
    kept = {k: v for k, v in digests(folder).items() if not k.startswith("_meta/repair/")}
    assert kept == damaged
    plan = plan_repair(store, verify_cache(store))
    assert repair_cache(store, plan, lambda flags: stage("cache_teacher", flags).code) == 0
    assert digests(folder) == digests(written)
    assert verify_cache(store) == []


def test_repair_of_a_cache_with_responses_that_could_not_be_written(
    writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    hook = ("unanswered", [next(iter(response_rows(written)))])
    folder = tmp_path / "cache"
    every = [*writing, "--cache_dir", folder, "--capture.max_quarantined_fraction", "0.03"]
    stage("cache_teacher", every, hook=hook).refused(3)
    before = digests(folder)
    _flip(folder / RESPONSES / "00001.parquet")
    store = Store(str(folder))
    plan = plan_repair(store, verify_cache(store))
    repair_cache(store, plan, lambda flags: stage("cache_teacher", flags, hook=hook).code)
    assert digests(folder) == before


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
    assert (
        "the shards are made from the responses as they are: another --cache_dir has those prompts "
        "tried again"
    ) in message
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
