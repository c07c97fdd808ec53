"""`repair` brings a damaged cache back to its bytes, by stage one where nothing else can."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import open_cache
from pipeline.cache.layout.names import record_name
from pipeline.errors import CacheError, run_command
from tests.conftest import Tiny, digests
from tests.stage_runner import ENVIRONMENT, ROOT, Result, run_python
from tests.unit.cache.planned_cache import flip

pytestmark = pytest.mark.slow  # each test runs stage one several times

SHARD = "data/train/00001.parquet"


@pytest.fixture
def damaged(tiny_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_cache, tmp_path / "cache"))


def _repair(folder: Path, *flags: str) -> Result:
    return run_python(["-m", "pipeline.cache", "repair", folder, *flags])


def _flip(name: str) -> Callable[[Path], None]:
    return lambda folder: flip(folder / name, (folder / name).stat().st_size // 2)


def _delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def _swap(one: str, two: str) -> Callable[[Path], None]:
    def swap(folder: Path) -> None:
        a, b = (folder / one).read_bytes(), (folder / two).read_bytes()
        (folder / one).write_bytes(b)
        (folder / two).write_bytes(a)

    return swap


def _several(*acts: Callable[[Path], None]) -> Callable[[Path], None]:
    def all_of_them(folder: Path) -> None:
        for act in acts:
            act(folder)

    return all_of_them


FROM_THE_REST = {
    "a record": _flip(record_name("train", 1)),
    "a record lost": _delete(record_name("heldout", 0)),
    "rows.bin": _flip("_meta/rows.bin"),
    "rows.bin and a record": _several(_cut("_meta/rows.bin"), _flip(record_name("train", 0))),
}
BY_STAGE_ONE = {
    "a page": _flip(SHARD),
    "the footer cut": _cut(SHARD),
    "the manifest and a shard": _several(_flip("_meta/manifest.json"), _delete(SHARD)),
    "two swapped": _several(
        _swap("data/train/00000.parquet", SHARD),
        _swap(record_name("train", 0), record_name("train", 1)),
    ),
    "the tokenizer": _flip("_meta/tokenizer/tokenizer.json"),
    "the plan": _flip("_meta/plan.json"),
    "everything": _several(
        _flip(SHARD),
        _flip("data/heldout/00000.parquet"),
        _flip("_meta/manifest.json"),
        _flip("_meta/plan.json"),
        _delete("_meta/rows.bin"),
        _delete("_meta/tokenizer/tokenizer.json"),
        _delete(record_name("train", 0)),
    ),
}


@pytest.mark.parametrize("what", FROM_THE_REST)
def test_what_the_rest_determines_needs_no_teacher(
    what: str, damaged: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.cache.tools import repair

    def no_stage(_arguments: object) -> int:
        raise AssertionError("stage one ran")

    monkeypatch.setattr(repair, "run_stage_one", no_stage)
    FROM_THE_REST[what](damaged)
    assert run_command(lambda: main(["verify", str(damaged)])) == 3
    assert main(["repair", str(damaged)]) == 0
    assert digests(damaged) == digests(tiny_cache)


@pytest.mark.parametrize(
    "what",
    [
        what if what in ("a page", "everything") else pytest.param(what, marks=pytest.mark.slow)
        for what in BY_STAGE_ONE
    ],
)
def test_the_original_bytes_come_back(
    what: str,
    damaged: Path,
    tiny_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    BY_STAGE_ONE[what](damaged)
    assert run_command(lambda: main(["verify", str(damaged)])) == 3
    before = digests(damaged)
    assert main(["repair", str(damaged), "--dry-run"]) == 0
    assert "run stage one" in capsys.readouterr().out
    assert digests(damaged) == before
    assert run_command(lambda: main(["repair", str(damaged)])) == 0
    assert digests(damaged) == digests(tiny_cache)
    assert run_command(lambda: main(["verify", str(damaged)])) == 0


def test_a_whole_cache_is_left_alone(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {file: file.stat().st_mtime_ns for file in damaged.rglob("*")}
    assert main(["repair", str(damaged)]) == 0
    assert "0 files repaired" in capsys.readouterr().out
    assert times == {file: file.stat().st_mtime_ns for file in damaged.rglob("*")}


@pytest.mark.slow
def test_an_unfinished_cache_is_finished(damaged: Path, tiny_cache: Path) -> None:
    for name in ("_meta/manifest.json", "_meta/rows.bin", "README.md", SHARD):
        (damaged / name).unlink()
    (damaged / record_name("train", 1)).unlink()
    _repair(damaged).ok()
    found, wanted = digests(damaged), digests(tiny_cache)
    # Nobody kept the command that the card names.
    assert {**found, "README.md": ""} == {**wanted, "README.md": ""}


def test_files_of_nobody(
    damaged: Path, tiny_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(damaged / SHARD, damaged / "data/train/00099.parquet")
    (damaged / "data/train/mine.parquet").write_bytes(b"PAR1")
    assert main(["repair", str(damaged)]) == 0
    told = capsys.readouterr().out
    assert "removed by hand: data/train/mine.parquet" in told
    (damaged / "data/train/mine.parquet").unlink()
    assert digests(damaged) == digests(tiny_cache)


@pytest.mark.slow
def test_killed_at_any_time_the_same_command_goes_on(damaged: Path, tiny_cache: Path) -> None:
    for name in (SHARD, "data/train/00000.parquet", "_meta/rows.bin"):
        _flip(name)(damaged)
    command = [sys.executable, "-m", "pipeline.cache", "repair", str(damaged)]
    env = {**os.environ, **ENVIRONMENT}
    for delay in (1.5, 4.0, 7.0):
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    _repair(damaged).ok()
    found = digests(damaged)
    assert found == digests(tiny_cache)


def test_a_teacher_that_is_gone_loses_nothing(
    damaged: Path, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = damaged / "_meta/config.yaml"
    config.write_text(config.read_text().replace(str(tiny.teacher), str(tmp_path / "gone")))
    _flip(SHARD)(damaged)
    _flip("_meta/tokenizer/tokenizer.json")(damaged)
    before = digests(damaged)
    done = _repair(damaged)
    assert done.code == 3
    assert "Traceback" not in done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2  # stage one's own, then what it means for the cache
    assert str(tmp_path / "gone") in errors[0]
    assert "stage one could not compute what is missing" in errors[1]
    kept = {k: v for k, v in digests(damaged).items() if not k.startswith("_meta/repair/")}
    assert kept == before
    assert open_cache(str(damaged)).source("train").read_rows(0, [0])


def test_without_a_configuration(damaged: Path) -> None:
    (damaged / "_meta/config.yaml").unlink()
    _flip(SHARD)(damaged)
    before = digests(damaged)
    with pytest.raises(CacheError, match=r"holds no _meta/config.yaml"):
        main(["repair", str(damaged)])
    assert digests(damaged) == before
