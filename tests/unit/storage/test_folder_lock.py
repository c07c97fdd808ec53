"""A folder has one owner: on one machine, across machines, after a kill, and of a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import StoreError
from pipeline.storage import folder_lock
from pipeline.storage.folder_lock import FolderLock
from tests.stage_runner import ROOT

QUICK = {"beat_s": 0.05, "stale_s": 0.5}


def _lock(folder: Path, **more: Any) -> FolderLock:
    return FolderLock(folder, ".lock", **{**QUICK, **more})


def _other_machine(folder: Path, beat: int = 1) -> None:
    record = {"owner": "x", "machine": "m2", "host": "node-b", "pid": os.getpid(), "beat": beat}
    (folder / ".lock").write_text(json.dumps(record))


def test_a_living_owner_of_this_machine_is_named_at_once(tmp_path: Path) -> None:
    with _lock(tmp_path).take():
        started = time.monotonic()
        with pytest.raises(StoreError, match=rf"process {os.getpid()} on .* trains into it"):
            _lock(tmp_path, stale_s=60).take(doing="trains into")
        assert time.monotonic() - started < 2
    assert not (tmp_path / ".lock").exists()
    _lock(tmp_path).take().release()


def test_a_killed_owner_of_this_machine_leaves_it_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from pipeline.storage.folder_lock import FolderLock\n"
        "FolderLock(Path(sys.argv[1]), '.lock').take(); print('held', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    assert not _lock(tmp_path, stale_s=60).try_take()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert _lock(tmp_path, stale_s=60).try_take()


def test_an_owner_elsewhere_that_beats_is_alive_however_old(tmp_path: Path) -> None:
    _other_machine(tmp_path)
    os.utime(tmp_path / ".lock", (1, 1))  # its clock says nothing
    beats = threading.Timer(0.2, _other_machine, (tmp_path, 2))
    beats.start()
    with pytest.raises(StoreError, match="on node-b"):
        _lock(tmp_path, stale_s=30).take()
    beats.join()


def test_an_owner_elsewhere_that_stands_still_is_taken_over(tmp_path: Path) -> None:
    """Its process number is that of a living process here, which means nothing."""
    _other_machine(tmp_path)
    started = time.monotonic()
    lock = _lock(tmp_path).take()
    assert 0.4 < time.monotonic() - started < 10
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()


def test_each_new_beat_begins_the_watch_again(tmp_path: Path) -> None:
    now = [0.0]
    lock = _lock(tmp_path, clock=lambda: now[0])
    for beat in range(1, 30):
        _other_machine(tmp_path, beat)
        assert not lock.try_take()
        now[0] += 0.1


def test_who_was_taken_over_leaves_the_next_owners_file(tmp_path: Path) -> None:
    lock = _lock(tmp_path, beat_s=60).take()
    (tmp_path / ".lock").unlink()
    _other_machine(tmp_path)
    lock.release()
    assert lock.owner_record()["owner"] == "x"


def test_of_two_that_take_over_the_last_to_write_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _other_machine(tmp_path)
    lock = _lock(tmp_path)
    monkeypatch.setattr(lock, "_stands_still", lambda _content: True)
    monkeypatch.setattr(folder_lock.time, "sleep", lambda _s: _other_machine(tmp_path, 9))
    assert not lock.try_take()


def test_without_locks_of_the_file_system_the_heartbeat_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "_flock", lambda _handle: None)
    with _lock(tmp_path).take(), pytest.raises(StoreError):
        _lock(tmp_path, stale_s=30).take()


def test_an_owner_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    lost = threading.Event()
    lock = _lock(tmp_path, lost=lost.set).take()
    _other_machine(tmp_path)
    assert lost.wait(5)
    lock.release()


def test_a_child_that_was_handed_the_lock_keeps_it(tmp_path: Path) -> None:
    lock = _lock(tmp_path).take()
    assert lock.handle is not None
    child = subprocess.Popen(["sleep", "60"], pass_fds=(lock.handle,))
    lock.hand_to(child.pid)
    other = _lock(tmp_path)
    time.sleep(0.7)  # longer than stale_s: the kernel knows better
    assert not other.try_take()
    assert other.holder().startswith(f"process {child.pid} on ")
    child.kill()
    child.wait()
    assert other.try_take()


def test_a_forked_child_does_not_keep_it(tmp_path: Path) -> None:
    lock = _lock(tmp_path).take()
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    lock._end_beats()
    lock._close()  # as a kill does
    try:
        deadline = time.monotonic() + 10
        while not _lock(tmp_path, stale_s=60).try_take():
            assert time.monotonic() < deadline
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_run_leaves_the_folder_of_a_living_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.student import run as student_run
    from pipeline.student.training.distributed import Distributed

    (tmp_path / "init.1.partial").mkdir()
    trained: list[bool] = []
    monkeypatch.setattr(student_run, "read_distributed", lambda: Distributed(0, 0, 1))
    monkeypatch.setattr(student_run, "is_exported", lambda *_: False)
    monkeypatch.setattr(student_run, "init_distributed", lambda *_, **__: None)
    monkeypatch.setattr(student_run, "shut_down_distributed", lambda: None)
    monkeypatch.setattr(student_run, "push_if_asked", lambda *_: None)
    monkeypatch.setattr(student_run, "_train", lambda *_: trained.append(True))
    monkeypatch.setattr(student_run, "use_cores", lambda: None)
    inputs: Any = SimpleNamespace(
        output_dir=tmp_path, output=None, dtype="fp32",
        identity=lambda _size: SimpleNamespace(digest="d"),
        train=SimpleNamespace(timeout_s=1, resume_from_checkpoint="auto"),
    )  # fmt: skip
    with (
        FolderLock(tmp_path, student_run.LOCK_FILE).take(),
        pytest.raises(StoreError, match="trains a student into it"),
    ):
        student_run.train_student(inputs, resolved_config="", command="")
    assert not trained
    assert (tmp_path / "init.1.partial").exists()
    student_run.train_student(inputs, resolved_config="", command="")
    assert trained
