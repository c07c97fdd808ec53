"""Workers of one machine: which GPUs each gets, what is told of them, and one exit code for all."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.api.settings import TeacherRun
from pipeline.config.mistakes import validated
from pipeline.errors import ConfigError
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.settings import TeacherSettings
from stages import workers as workers_module
from stages.flags import take_flag
from stages.workers import _run, _Worker, main, plan_devices
from tests.stage_runner import ROOT

EIGHT = tuple(map(str, range(8)))


def _teacher(parallel: int = 1, **options: object) -> TeacherRun:
    return TeacherRun(
        teacher=TeacherSettings(tensor_parallel_size=parallel, engine_options=dict(options))
    )


def _written(parallel: int, writer_parallel: int) -> TeacherRun:
    generate = GenerateSettings(enabled=True, writer="w", writer_parallel_size=writer_parallel)
    return _teacher(parallel).model_copy(update={"generate": generate})


def _gpus(plan: list[dict[str, str]]) -> list[str]:
    return [own["CUDA_VISIBLE_DEVICES"] for own in plan]


def test_each_teacher_gets_its_gpus() -> None:
    assert _gpus(plan_devices(_teacher(), None, "all", EIGHT)) == list(EIGHT)
    assert _gpus(plan_devices(_teacher(4), None, "all", EIGHT)) == ["0,1,2,3", "4,5,6,7"]
    assert _gpus(plan_devices(_teacher(2, pipeline_parallel_size=2), 1, None, EIGHT)) == ["0,1,2,3"]
    assert _gpus(plan_devices(_teacher(), 2, None, EIGHT)) == ["0", "1"]
    assert _gpus(plan_devices(_teacher(), None, "5,GPU-7f", EIGHT)) == ["5", "GPU-7f"]
    assert _gpus(plan_devices(_teacher(3), None, "all", EIGHT)) == ["0,1,2", "3,4,5"]
    assert plan_devices(_teacher(), 3, None, ()) == [{}, {}, {}]
    assert _gpus(plan_devices(_written(1, 2), None, "0,1,2,3", EIGHT)) == ["0,1", "2,3"]
    assert _gpus(plan_devices(_written(4, 1), 1, None, EIGHT)) == ["0,1,2,3"]
    over_machines = _teacher(16, distributed_executor_backend="ray")
    assert plan_devices(over_machines, 2, None, EIGHT) == [{}, {}], "Ray gives each its GPUs"
    with pytest.raises(ConfigError, match="Ray gives each its 16 GPUs"):
        plan_devices(over_machines, 1, "all", EIGHT)


@pytest.mark.parametrize(
    ("parallel", "nproc", "named", "visible", "message"),
    [
        (1, None, "all", (), "no GPU can be seen"),
        (1, 9, None, EIGHT, "--nproc 9: found 8 GPUs"),
        (4, 3, "all", EIGHT, "found 8 GPUs, 4 of which share a teacher.*at least 12"),
        (4, None, "0,1", EIGHT, "found 2 GPUs, 4 of which"),
    ],
)
def test_too_few_gpus_are_told(
    parallel: int, nproc: int | None, named: str | None, visible: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_devices(_teacher(parallel), nproc, named, visible)


def test_a_writer_that_cannot_be_shared() -> None:
    teacher = {"engine": "transformers"}
    generate = {"enabled": True, "writer": "w", "writer_parallel_size": 2}
    with pytest.raises(ConfigError, match="writer_parallel_size: found 2 with a writer on transf"):
        validated(TeacherRun, {"teacher": teacher, "generate": generate})


def test_flags_of_the_launcher_are_taken_out() -> None:
    rest = ["--a", "1", "--nproc", "2", "--gpus=all"]
    rest, nproc = take_flag(rest, "--nproc")
    rest, gpus = take_flag(rest, "--gpus")
    assert (rest, nproc, gpus) == (["--a", "1"], "2", "all")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nproc", "none"], "--nproc: found 'none'"),
        (["--nproc", "2", "--verify"], "--verify with several workers"),
        (["--nproc", "2", "--teacher.no_such", "1"], "no_such"),
    ],
)
def test_mistakes_are_told_before_any_worker_starts(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ConfigError, match=message):
        main(argv)


SAYS = """
import json, os, sys, time
number, code, done = map(int, sys.argv[1:])
file = os.environ["DISTILL_PROGRESS_FILE"]
numbers = {"description": "cache-teacher", "unit": "tokens", "initial": 0, "total": 30}
open(file, "w").write(json.dumps({**numbers, "done": done}))
print("a line", file=sys.stderr)
print(f"this worker: {done} tokens")
if code not in (0, 5):
    print(f"error: reason {code}; do this", file=sys.stderr)
    print("  more of it", file=sys.stderr)
else:
    print("cache c: complete")
    time.sleep(0.8)
sys.stdout.flush()
os._exit(code) if code < 100 else os.kill(os.getpid(), code - 128)
"""


def _workers(folder: Path, codes: list[int], done: int = 10) -> list[_Worker]:
    return [
        _Worker(
            n, {"CUDA_VISIBLE_DEVICES": str(n)}, folder / f"{n}.json",
            [sys.executable, "-c", SAYS, str(n), str(code), str(done)],
        )
        for n, code in enumerate(codes)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([0, 6], 0),  # a stuck device; the other has done it all
        ([0, 137], 0),
        ([5, 0], 5),
        ([3, 3], 3),
        ([137, 4], 4),
        ([137, 137], 137),
    ],
)
def test_one_code_for_all(codes: list[int], code: int, tmp_path: Path) -> None:
    assert _run(_workers(tmp_path, codes), 60) == code


def test_one_log_and_one_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(_workers(tmp_path, [0, 6, 0]), 0.01) == 0
    out, err = capfd.readouterr()
    lines = [f"worker {n}: cache c: complete" for n in (0, 2)]  # not all said so
    assert set(lines) < set(out.splitlines())
    assert out.splitlines()[-1] == "this worker: 10 tokens"
    assert "worker 1 (GPU 1) ended with exit code 6: reason 6; do this; the others go on" in err
    assert "worker 0: a line" in err
    assert "worker 2: a line" in err
    assert "error: " not in err, "the work is done"
    assert _run(_workers(tmp_path, [3, 3]), 60) == 3
    err = capfd.readouterr().err
    assert err.count("error: reason 3; do this\n  more of it") == 1


def test_one_bar_shows_the_sum(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        _run(_workers(tmp_path, [0, 0, 0]), 0.01)
    assert "cache-teacher: 30/30 tokens (100.0 %)" in caplog.messages[-1]


WAITS = """
import signal, sys, time
from stages.workers import _Worker, _run
from pathlib import Path
workers = [
    _Worker(n, {}, Path(sys.argv[1]) / f"{n}.json",
            [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"])
    for n in range(2)
]
sys.exit(_run(workers, 60))
"""


def test_a_stop_is_passed_on(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", WAITS, str(tmp_path)], cwd=ROOT)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    until = time.monotonic() + 60
    while len(children.read_text().split()) < 2:
        assert time.monotonic() < until
        time.sleep(0.02)
    pids = children.read_text().split()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 143
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_console_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages import __main__ as console

    seen: list[list[str]] = []
    monkeypatch.setattr(workers_module, "main", lambda rest: seen.append(rest) or 0)
    assert console.main(["cache-teacher", "--gpus=all", "--cache_dir", "c"]) == 0
    assert seen == [["--gpus=all", "--cache_dir", "c"]]
