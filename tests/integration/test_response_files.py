"""The files of responses: kept, made again when damaged, known to `verify`, left out where lost."""

from __future__ import annotations

import shutil
import signal
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
    stage("cache_teacher", every, hook=hook).refused(5)
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
    message = result.refused(5)
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
    assert again.refused(5) == message
    assert content_digests(folder) == before
    # Three are too many for this share: said after all others are written, before the capture.
    many = tmp_path / "many"
    every[every.index(folder)] = many
    result = stage("cache_teacher", every, hook=("unanswered", [*lost, names[31]]))
    assert "3 of 72 responses could not be written" in result.refused(3)
    assert not (many / "data").exists()


@pytest.mark.slow
def test_a_response_that_kills_its_process_is_found(
    writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    lost = list(response_rows(written))[25]
    folder = tmp_path / "cache"
    every = [*writing, "--cache_dir", folder, "--capture.tries", "2"]
    for _ in range(4):  # two of the shard, two of the response
        killed = stage("cache_teacher", every, hook=("deadly", [lost]))
        assert killed.code == -signal.SIGKILL
    message = stage("cache_teacher", every, hook=("deadly", [lost])).refused(5)
    assert f"sample {lost} (responses/00001), 2 tries: the process died" in message
    assert set(cached_rows(folder)) == set(cached_rows(written)) - {lost}
    assert not list((folder / "_meta/leases").glob("*"))


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


@pytest.mark.parametrize(
    "lost",
    [
        "file and unit",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("all units", "no manifest")),
    ],
)
def test_they_are_refused_where_their_unit_is_lost_as_well(
    lost: str, writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    (folder / RESPONSES / "00001.parquet").unlink()
    units = folder / RESPONSES / "units"
    if lost == "all units":
        shutil.rmtree(units)
    else:
        (units / "summaries/00001.json").unlink()
    if lost == "no manifest":
        (folder / "_meta/manifest.json").unlink()
    every = [*writing, "--cache_dir", folder]
    # Killed after the file is written and before anything is compared: the next one compares.
    killed = stage(
        "cache_teacher",
        every,
        hook=(
            "hooks",
            ("other_draws",),
            ("kill_before", "pipeline.teacher.generation.units", "ResponseUnits.view"),
        ),
    )
    assert killed.code == -signal.SIGKILL
    assert (folder / RESPONSES / "00001.parquet").exists()
    for _ in range(2):
        message = stage("cache_teacher", every, hook=("other_draws",)).refused(3)
        assert "responses that were lost and written again came out otherwise" in message
    shards = {n: v for n, v in content_digests(folder).items() if n.startswith("data/")}
    assert shards
    assert shards.items() <= content_digests(written).items()
    shutil.copy(written / RESPONSES / "00001.parquet", folder / RESPONSES)
    stage("cache_teacher", every, hook=("forbid_loading",)).ok()
    assert content_digests(folder) == content_digests(written)


def _flip(file: Path) -> None:
    data = file.read_bytes()
    place = len(data) // 3
    file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


@pytest.mark.parametrize("beside", ["a shard damaged", "prompts lost"])
def test_verify_mends_responses_whatever_else_is_lacking(
    beside: str, writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    _flip(folder / RESPONSES / "00001.parquet")
    if beside == "a shard damaged":
        _flip(folder / "data/train/00000.parquet")
    else:
        shutil.rmtree(folder / "_meta/corpus")
    stage("cache_teacher", [*writing, "--cache_dir", folder, "--verify"]).ok()
    assert verify_cache(Store(str(folder))) == []
    assert content_digests(folder) == content_digests(written)


@pytest.mark.parametrize("how", ["damaged", pytest.param("missing", marks=pytest.mark.slow)])
def test_a_file_lost_together_with_its_samples_is_written_again(
    how: str, writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    file = folder / RESPONSES / "00001.parquet"
    _flip(file)
    if how == "missing":
        file.unlink()
    (folder / RESPONSES / "units/tokens/00001-0.parquet").write_bytes(b"cut")
    shutil.rmtree(folder / "data")
    result = stage("cache_teacher", [*writing, "--cache_dir", folder]).ok()
    assert ("damaged, and what was made from it is damaged; written again" in result.err) == (
        how == "damaged"
    )
    assert content_digests(folder) == content_digests(written)


@pytest.mark.parametrize("damage", ["samples", "a summary", "prompts"])
def test_a_dry_run_repairs_nothing(
    damage: str, writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    (corpus,) = (folder / "_meta/corpus").iterdir()
    spoiled = {
        "samples": [*(folder / RESPONSES / "units/tokens").iterdir()],
        "a summary": [folder / RESPONSES / "units/summaries/00001.json"],
        "prompts": [*(corpus / "tokens").iterdir(), *(corpus / "summaries").iterdir()],
    }[damage]
    assert spoiled
    for file in spoiled:
        file.write_bytes(b"cut")
    before = digests(folder)
    out = stage("cache_teacher", [*writing, "--cache_dir", folder, "--dry-run"]).ok().out
    assert ("at most" in out) == (damage == "a summary")
    assert digests(folder) == before


def test_a_complete_cache_is_left_without_leftovers(
    writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    (folder / RESPONSES / "00001.parquet").unlink()
    # Files that are not planned are nobody's; they do not stand for one that is lacking.
    shutil.copy(folder / RESPONSES / "00002.parquet", folder / RESPONSES / "00009.parquet")
    every = [*writing, "--cache_dir", folder]
    killed = stage("cache_teacher", every, hook=("kill_at_sync", 3))
    assert killed.code == -signal.SIGKILL
    assert list((folder / "_meta/leases").iterdir())
    stage("cache_teacher", every).ok()
    (folder / RESPONSES / "00009.parquet").unlink()
    assert not list(folder.rglob("*.partial"))
    assert not list((folder / "_meta/leases").glob("*"))
    assert content_digests(folder) == content_digests(written)


def test_a_file_of_another_cache_is_not_taken_and_not_deleted(
    writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    others = (folder / RESPONSES / "00002.parquet").read_bytes()
    (folder / RESPONSES / "00001.parquet").write_bytes(others)
    every = [*writing, "--cache_dir", folder, "--verify"]
    message = stage("cache_teacher", every, hook=("forbid_loading",)).refused(3)
    assert "00001.parquet: answers other prompts than those of the corpus" in message
    assert (folder / RESPONSES / "00001.parquet").read_bytes() == others
