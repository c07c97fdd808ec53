"""Stage one writes the same bytes: run twice, killed, damaged, complete."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cache.io.reader import open_cache
from pipeline.errors import CacheError
from tests.conftest import Stage, Tiny, digests
from tests.stage_runner import Running, real_stage


def _bytes_of_a_cache(folder: Path) -> dict[str, str]:
    """Return the digests of a cache, with its folder's name removed from the two texts."""
    found = digests(folder)
    texts = "".join((folder / name).read_text() for name in ("README.md", "_meta/config.yaml"))
    for name in ("README.md", "_meta/config.yaml"):
        del found[name]
    return {**found, "texts": texts.replace(str(folder), "CACHE")}


@pytest.mark.slow
def test_the_command_twice_gives_the_same_bytes(
    tiny: Tiny, tiny_cache: Path, tmp_path: Path
) -> None:
    # The command as typed, in a separate process.
    result = real_stage("cache_teacher", [*tiny.stage_one, "--cache_dir", tmp_path / "cache"])
    result.ok()
    assert re.search(
        r"cache .*: \d+ shards, \d+ supervised tokens, .* identity [0-9a-f]{12}", result.out
    )
    assert _bytes_of_a_cache(tmp_path / "cache") == _bytes_of_a_cache(tiny_cache)
    names = set(digests(tiny_cache))
    assert {"README.md", "_meta/manifest.json", "data/train/00000.parquet"} <= names
    assert len(open_cache(str(tiny_cache)).records()) >= 5


# 2 syncs a write (file, folder): in the plan, before and between the shards, in a shard's record,
# in the row index, and in the manifest itself.
@pytest.mark.parametrize("sync", [1, 2, 5, 12, 16, 19, 23, 31, 35])
def test_killed_in_the_middle_of_a_write(
    sync: int, tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache"]
    killed = stage("cache_teacher", flags, hook=("kill_at_sync", sync))
    assert killed.code == -signal.SIGKILL, killed
    assert not list((tmp_path / "cache").rglob("manifest.json")) or sync == 35
    for file in (tmp_path / "cache").rglob("*.parquet"):
        assert file.read_bytes()[-4:] == b"PAR1", "a reader would see half a shard"
    stage("cache_teacher", flags).ok()
    assert _bytes_of_a_cache(tmp_path / "cache") == _bytes_of_a_cache(tiny_cache)


def test_killed_from_outside_at_the_first_shard(
    tiny: Tiny, tiny_cache: Path, start: Callable[..., Running], stage: Stage, tmp_path: Path
) -> None:
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache"]
    running = start("cache_teacher", flags)
    end = time.monotonic() + 60
    while not list((tmp_path / "cache" / "_meta" / "shards").glob("*.parquet")):
        assert time.monotonic() < end
        time.sleep(0.001)
    os.kill(running.process.pid, signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    stage("cache_teacher", flags).ok()
    assert _bytes_of_a_cache(tmp_path / "cache") == _bytes_of_a_cache(tiny_cache)


def test_sigterm_says_how_to_go_on(tiny: Tiny, stage: Stage, tmp_path: Path) -> None:
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache"]
    result = stage("cache_teacher", flags, hook=("signal_at_sync", 12, int(signal.SIGTERM)))
    message = result.refused(143)
    assert message.startswith("stopped by SIGTERM; run the same command again")
    stage("cache_teacher", flags).ok()


def test_ctrl_c_says_how_to_go_on(tiny: Tiny, stage: Stage, tmp_path: Path) -> None:
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache"]
    result = stage("cache_teacher", flags, hook=("signal_at_sync", 12, int(signal.SIGINT)))
    assert result.refused(130) == "interrupted; the same command continues the run."


def test_two_at_the_same_time_make_the_same_cache(
    tiny: Tiny, tiny_cache: Path, start: Callable[..., Running], tmp_path: Path
) -> None:
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache"]
    both = [start("cache_teacher", flags) for _ in range(2)]
    for running in both:
        running.wait().ok()
    assert _bytes_of_a_cache(tmp_path / "cache") == _bytes_of_a_cache(tiny_cache)


@pytest.mark.parametrize("damage", ["deleted", "flipped", "cut"])
def test_a_damaged_shard_is_made_again_to_the_same_bytes(
    damage: str, tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(tiny_cache, folder)
    shard = folder / "data/train/00001.parquet"
    data = shard.read_bytes()
    match damage:
        case "deleted":
            shard.unlink()
        case "flipped":
            half = len(data) // 2
            shard.write_bytes(data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :])
        case _:
            shard.write_bytes(data[:-100])
    others = folder / "data/train/00000.parquet"
    before = others.stat().st_mtime_ns
    # A size is compared at each start of a small cache, a checksum where it is asked for.
    asked = ["--verify"] if damage == "flipped" else []
    stage("cache_teacher", [*tiny.stage_one, "--cache_dir", folder, *asked]).ok()
    assert _bytes_of_a_cache(folder) == _bytes_of_a_cache(tiny_cache)
    assert others.stat().st_mtime_ns == before, "intact shards are not touched"


@pytest.mark.parametrize("damage", ["deleted", "flipped"])
def test_lost_records_cost_no_capture(
    damage: str, tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(tiny_cache, folder)
    (records,) = (folder / "_meta/shards").glob("train-*.parquet")
    data = records.read_bytes()
    records.unlink()
    if damage == "flipped":
        records.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    flags = [*tiny.stage_one, "--cache_dir", folder]
    message = stage("cache_teacher", flags, hook=("forbid_loading",)).refused(3)
    assert "records missing or damaged" in message
    assert "python -m pipeline.cache repair" in message


def test_a_damaged_segment_of_records_is_made_again_with_its_shards(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(tiny_cache, folder)
    (records,) = (folder / "_meta/shards").glob("train-*")
    records.write_bytes(records.read_bytes()[:-20])
    (folder / "_meta/manifest.json").unlink()
    stage("cache_teacher", [*tiny.stage_one, "--cache_dir", folder]).ok()
    assert _bytes_of_a_cache(folder) == _bytes_of_a_cache(tiny_cache)


def test_a_cache_in_repair_does_not_call_itself_complete(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    shutil.copytree(tiny_cache, tmp_path / "cache")
    (tmp_path / "cache/data/train/00001.parquet").unlink()
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache"]
    assert stage("cache_teacher", flags, hook=("kill_at_sync", 10)).code == -signal.SIGKILL
    with pytest.raises(CacheError, match="the cache is incomplete"):
        open_cache(str(tmp_path / "cache"))
    stage("cache_teacher", flags).ok()
    assert _bytes_of_a_cache(tmp_path / "cache") == _bytes_of_a_cache(tiny_cache)


def test_a_complete_cache_loads_no_teacher(tiny: Tiny, tiny_cache: Path, stage: Stage) -> None:
    before = digests(tiny_cache)
    flags = [*tiny.stage_one, "--cache_dir", tiny_cache]
    result = stage("cache_teacher", flags, hook=("forbid_loading",)).ok()
    assert "is complete" in result.err
    assert digests(tiny_cache) == before


def test_a_lost_manifest_is_written_again_without_the_teacher(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    shutil.copytree(tiny_cache, tmp_path / "cache")
    (tmp_path / "cache/_meta/manifest.json").unlink()
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache"]
    stage("cache_teacher", flags, hook=("forbid_loading",)).ok()
    assert _bytes_of_a_cache(tmp_path / "cache") == _bytes_of_a_cache(tiny_cache)


def test_another_identity_is_refused(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    before = digests(tiny_cache)
    changed = [*tiny.stage_one, "--capture.top_k", "8", "--seed", "43", "--cache_dir", tiny_cache]
    message = stage("cache_teacher", changed, hook=("forbid_loading",)).refused(3)
    assert "holds a cache of another identity" in message
    assert "scheme.top_k: 16 there, 8 asked for" in message
    assert "corpus.seed: 42 there, 43 asked for" in message
    assert "expected an empty folder" in message
    assert "choose another --cache_dir" in message
    assert "\n" not in message.strip()
    assert digests(tiny_cache) == before
    # The beginning of one counts as well: the plan alone says whose it is.
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "begun"]
    assert stage("cache_teacher", flags, hook=("kill_at_sync", 12)).code == -signal.SIGKILL
    before = digests(tmp_path / "begun")
    message = stage("cache_teacher", [*flags, "--max_length", "95"]).refused(3)
    assert "corpus.max_length: 96 there, 95 asked for" in message
    assert digests(tmp_path / "begun") == before
