"""Trainings side by side: forks with names before their lines; one that fails stops the others."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, Interrupted
from stages import trainings as module
from stages.trainings import Trainings, load_libraries, threads_of


def _nothing() -> None:
    return None


def _trainings(main: Callable[[Sequence[str]], int], at_once: int = 2) -> Trainings:
    return Trainings(main, at_once=at_once, prepare=_nothing)


def _until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("trainings", "cores", "threads"), [(2, 2, 1), (2, 8, 4), (3, 8, 2), (3, 2, 1), (2, 1, 1)]
)
def test_each_has_its_part_of_the_cores(trainings: int, cores: int, threads: int) -> None:
    assert threads_of(trainings, cores=cores) == threads


def test_lines_come_out_whole_with_names_before_them(capfd: pytest.CaptureFixture[str]) -> None:
    def main(arguments: Sequence[str]) -> int:
        sys.stdout.write(f"begins {arguments[0]}, ")
        sys.stdout.flush()
        time.sleep(0.05)
        print("ends")
        print("a warning", file=sys.stderr)
        sys.stdout.write("no end of line")
        return 0

    trainings = _trainings(main)
    with trainings.open():
        trainings.start("student", ["one"])
        trainings.start("control", ["two"])
        trainings.finish()
    assert trainings.failed is None
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == [
        "control: begins two, ends", "control: no end of line",
        "student: begins one, ends", "student: no end of line",
    ]  # fmt: skip
    assert sorted(err.splitlines()) == ["control: a warning", "student: a warning"]


def test_they_run_at_the_same_time_but_no_more_than_there_is_room_for(tmp_path: Path) -> None:
    def main(arguments: Sequence[str]) -> int:
        (tmp_path / arguments[0]).touch()
        other = tmp_path / arguments[1]
        _until(other.exists)
        return 0

    trainings = _trainings(main)
    with trainings.open():
        trainings.start("a", ["a", "b"])
        trainings.start("b", ["b", "a"])
        trainings.finish()
    assert trainings.failed is None

    def alone(arguments: Sequence[str]) -> int:
        there = len(list(tmp_path.glob("alone-*")))
        (tmp_path / f"alone-{arguments[0]}").touch()
        time.sleep(0.1)
        (tmp_path / f"alone-{arguments[0]}").unlink()
        return there

    one_by_one = _trainings(alone, at_once=1)
    with one_by_one.open():
        for name in ("a", "b", "c"):
            one_by_one.start(name, [name])
        one_by_one.finish()
    assert one_by_one.failed is None, "no other one was there"


def test_the_next_begins_when_the_one_before_is_ready_or_has_ended(tmp_path: Path) -> None:
    def main(arguments: Sequence[str]) -> int:
        if arguments[0] == "slow":
            (tmp_path / "ready").touch()
            _until((tmp_path / "go").exists)
        return 0

    trainings = _trainings(main)
    with trainings.open():
        trainings.start("slow", ["slow"])
        trainings.wait_until((tmp_path / "ready").exists)
        assert (tmp_path / "ready").exists()
        trainings.start("quick", ["quick"])
        trainings.wait_until(lambda: False)  # until it has ended
        (tmp_path / "go").touch()
        trainings.finish()
    assert trainings.failed is None


def test_where_one_fails_the_others_are_stopped_and_none_begins(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: Sequence[str]) -> int:
        if arguments[0] == "fails":
            _until((tmp_path / "ready").exists)
            raise ConfigError("found nothing", expected="something")
        signal.signal(signal.SIGTERM, lambda *_: (tmp_path / "saved").touch() or os._exit(143))
        (tmp_path / "ready").touch()
        time.sleep(30)
        return 0

    trainings = _trainings(main)
    started = time.monotonic()
    with trainings.open():
        trainings.start("long", ["long"])
        trainings.start("short", ["fails"])
        trainings.wait_until(lambda: False)
        trainings.start("third", ["third"])
        trainings.finish()
    assert time.monotonic() - started < 20
    assert trainings.failed == ("short", ConfigError.exit_code)
    assert (tmp_path / "saved").exists()
    err = capfd.readouterr().err
    assert err.count("error: ") == 1
    assert err.startswith("short: error: found nothing")


def test_an_unexpected_error_keeps_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    def main(_: Sequence[str]) -> int:
        raise ZeroDivisionError("a bug")

    trainings = _trainings(main)
    with trainings.open():
        trainings.start("student", [])
        trainings.finish()
    assert trainings.failed == ("student", 1)
    assert "student: ZeroDivisionError: a bug" in capfd.readouterr().err


def test_sigterm_stops_all_of_them_and_is_told_once(tmp_path: Path) -> None:
    def main(arguments: Sequence[str]) -> int:
        name = arguments[0]
        signal.signal(
            signal.SIGTERM, lambda *_: (tmp_path / f"saved-{name}").touch() or sys.exit(0)
        )
        (tmp_path / f"ready-{name}").touch()
        time.sleep(30)
        return 0

    def terminate() -> None:
        _until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    trainings = _trainings(main)
    with pytest.raises(Interrupted, match="SIGTERM"), trainings.open():  # noqa: PT012
        trainings.start("a", ["a"])
        trainings.start("b", ["b"])
        threading.Thread(target=terminate).start()
        trainings.finish()
    assert {file.name for file in tmp_path.glob("saved-*")} == {"saved-a", "saved-b"}
    assert signal.getsignal(signal.SIGTERM) is before


def test_libraries_are_loaded_for_as_long_as_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(module.importlib, "import_module", loaded.append)
    load_libraries(lambda: len(loaded) < 2)
    assert len(loaded) == 2
    load_libraries()
    assert "pipeline.student.run" in loaded
    assert "stages.train_student" in loaded
