"""The same training whatever runs it: ranks, ZeRO stages, launchers, accumulation."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.observe.metrics import read_metrics
from pipeline.student.engine.launch import torchrun_arguments
from tests.conftest import Stage, Tiny
from tests.stage_runner import ENVIRONMENT, ROOT, Result, run_python

STEPS = 8
"""Into the second epoch: the first one's last step has fewer packs than ranks times passes."""


@pytest.fixture(scope="module")
def flags(tiny: Tiny, tiny_cache: Path) -> list[Any]:
    return [*tiny.stage_two, "--cache_dir", tiny_cache, "--max_steps", STEPS, "--save_steps", 100]


@pytest.fixture(scope="module")
def one_process(flags: list[Any], stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of one process, one pass of four packs a step."""
    folder = tmp_path_factory.mktemp("one") / "student"
    batch = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1)
    stage("train_student", [*flags, "--output_dir", folder, *batch]).ok()
    tokens = [r.values.get("train/tokens") for r in read_metrics(folder / "metrics.jsonl")][1:-1]
    assert min(tokens) < 0.6 * max(tokens), "there is a short step among them"
    return folder


def _launch(launcher: list[Any], flags: list[Any], folder: Path) -> Result:
    command = [*launcher, "-m", "stages.train_student", *flags, "--output_dir", folder]
    return run_python(command, timeout=280).ok()


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]


def _same(folder: Path, other: Path, *, rel: float = 1e-4) -> None:
    """Compare losses, held-out scores and final weights."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = (list(read_metrics(path / "metrics.jsonl")) for path in (folder, other))
    assert [record.step for record in ours] == [record.step for record in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in (
            "train/loss",
            "train/cross_entropy",
            "train/tokens",
            "train/epoch",
            "heldout/kl",
        ):
            assert (name in a.values) == (name in b.values)
            if name in a.values:
                assert a.values[name] == pytest.approx(b.values[name], rel=rel), (a.step, name)
    a, b = (load_file(path / "model/model.safetensors") for path in (folder, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rel, atol=2e-5, msg=name)


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 4), (2, 2)])
def test_accumulation_is_a_larger_batch(
    batch: int, accumulation: int, flags: list[Any], one_process: Path, stage: Stage, tmp_path: Path
) -> None:
    sizes = (
        "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation,
        "--loss.chunk_rows", 7,
    )  # fmt: skip
    folder = tmp_path / "student"
    stage("train_student", [*flags, "--output_dir", folder, *sizes]).ok()
    _same(folder, one_process)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_compiled_layers_compute_the_same(
    checkpointing: str, flags: list[Any], one_process: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    more = (
        "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2,
        "--torch_compile", "true", "--student.gradient_checkpointing", checkpointing,
    )  # fmt: skip
    stage("train_student", [*flags, "--output_dir", folder, *more]).ok()
    _same(folder, one_process, rel=1e-3)
    message = stage(
        "train_student", [*flags, "--output_dir", folder, *more, "--train.zero_stage", 3]
    ).refused(2)
    assert "train.torch_compile: found true with train.zero_stage 3" in message


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_one_process_under_every_zero_stage(
    zero: int, flags: list[Any], one_process: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    sizes = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2)
    stage(
        "train_student", [*flags, "--output_dir", folder, *sizes, "--train.zero_stage", zero]
    ).ok()
    _same(folder, one_process)


@pytest.mark.slow
def test_two_processes_are_as_one(flags: list[Any], one_process: Path, tmp_path: Path) -> None:
    sizes = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2)
    result = _launch(TORCHRUN, [*flags, *sizes], tmp_path / "student")
    _same(tmp_path / "student", one_process)
    assert result.out.count("student ") == 1, "one process speaks for both"


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_processes_under_every_zero_stage(
    zero: int, flags: list[Any], one_process: Path, tmp_path: Path
) -> None:
    """Stopped in the middle and run again, besides.

    Under ZeRO 3 with sequences one at a time: ranks of different numbers of them gather together.
    """
    sizes = (
        "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
        "--train.zero_stage", zero, "--save_steps", 2,
        *(("--student.forward", "alone") if zero == 3 else ()),
    )  # fmt: skip
    folder = tmp_path / "student"
    _launch(TORCHRUN, [*flags, *sizes], folder)
    _same(folder, one_process)
    # The end is lost; two ranks go on from the checkpoint before it.
    (folder / "finished.json").unlink()
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / f"checkpoints/step-{STEPS:08d}")
    result = _launch(TORCHRUN, [*flags, *sizes], folder)
    assert f"resuming after step 6 of {STEPS}" in result.err
    _same(folder, one_process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "processes"), [("--multi_gpu", 2), ("--use_deepspeed", 2), ("--cpu", 1)]
)
def test_accelerate_launch(
    kind: str, processes: int, flags: list[Any], one_process: Path, tmp_path: Path
) -> None:
    # Its own CPU mode starts several processes through mpirun only, and refuses --use_deepspeed
    # beside it; its way for GPUs is torchrun's and asks for none. Our loop brings DeepSpeed along
    # whoever starts the processes.
    command = [
        "-m", "accelerate.commands.launch", kind, "--num_processes", processes,
        "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", _port(),
    ]  # fmt: skip
    sizes = ("--per_device_train_batch_size", 4 // processes, "--gradient_accumulation_steps", 1)
    _launch(command, [*flags, *sizes], tmp_path / "student")
    _same(tmp_path / "student", one_process)


@pytest.mark.slow
def test_deepspeed_launcher(flags: list[Any], one_process: Path, tmp_path: Path) -> None:
    # It counts accelerators by itself; a CPU is one, of which it may start several.
    command = [
        "-m", "deepspeed.launcher.runner", "--num_gpus", 2, "--master_port", _port(),
        "--no_local_rank", "--module", "stages.train_student",
    ]  # fmt: skip
    sizes = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1)
    folder = tmp_path / "student"
    result = run_python([*command, *flags, *sizes, "--output_dir", folder], timeout=280).ok()
    assert (result.out + result.err).count(f"student {folder}/model") == 1
    _same(folder, one_process)


def _port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves(
    flags: list[Any], one_process: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Kubernetes does to a pod: the launcher gets it, hands it on, and waits for the save.

    Which takes longer than the 30 s after which torchrun kills by itself.
    """
    sizes = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1]
    folder = tmp_path / "student"
    more = [*flags, *sizes, "--output_dir", folder]
    marks = folder / "checkpoints"
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    # A launcher that waits for less than a save takes kills it, as torchrun's own 30 s may do.
    short = [_slowly(tmp_path, SAVE_S), *more]
    text = _stopped([*TORCHRUN, "--shutdown-timeout", SAVE_S // 3, *short], folder)
    assert "forcefully exiting via" in text
    assert not list(marks.glob("step-*/complete.json"))
    (folder / "metrics.jsonl").unlink()
    started = time.monotonic()
    text = _stopped([*torchrun_arguments(2), _slowly(tmp_path, LONG_SAVE_S), *more], folder)
    assert time.monotonic() - started > LONG_SAVE_S
    assert "stopped by SIGTERM after step" in text
    assert "start it with --shutdown-timeout" not in text
    assert len(list(marks.glob("step-*/complete.json"))) == 1
    result = _launch(TORCHRUN, [*flags, *sizes], folder)
    assert "resuming after step" in result.err
    assert "start it with --shutdown-timeout 570" in result.err
    _same(folder, one_process)


SAVE_S, LONG_SAVE_S = 6, 35


def _stopped(command: list[Any], folder: Path) -> str:
    """Run until step 3 is logged, send SIGTERM to the launcher, and return what was said."""
    import signal
    import subprocess
    import sys

    path = folder.parent / "log"
    with path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": "."}, stdout=log, stderr=log,
        )  # fmt: skip
        end = time.monotonic() + 120
        while not _logged(folder, 3):
            assert process.poll() is None, path.read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60 + LONG_SAVE_S) != 0
    return path.read_text()


def _slowly(tmp_path: Path, save_s: int) -> Path:
    """Return a script of stage two whose steps and saves take longer."""
    script = tmp_path / "slowly.py"
    script.write_text(
        "import sys, time\n"
        "from pipeline.student.training.deepspeed_engine import DeepSpeedEngine\n"
        "from pipeline.student.training.loop import TrainLoop\n"
        "step, save = TrainLoop._step, DeepSpeedEngine.save\n"
        "TrainLoop._step = lambda self, batch: (time.sleep(0.5), step(self, batch))[1]\n"
        "DeepSpeedEngine.save = lambda self, *folder, **options: (\n"
        f"    time.sleep({save_s}), save(self, *folder, **options)\n"
        ")[1]\n"
        "from pipeline.errors import run_command\n"
        "from stages.train_student import main\n"
        "sys.exit(run_command(main))\n"
    )
    return script


def _logged(folder: Path, step: int) -> bool:
    file = folder / "metrics.jsonl"
    return file.exists() and any(record.step == step for record in read_metrics(file))


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_the_run_goes_on(
    flags: list[Any], one_process: Path, tmp_path: Path
) -> None:
    """torchrun sees the death; the survivor says so, or is ended; what is saved is whole."""
    sizes = [
        "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
        "--save_steps", 2, "--train.timeout_s", 60,
    ]  # fmt: skip
    code = (
        "import os, sys\n"
        "from tests.stage_hooks import signal_at_step\n"
        "if os.environ['RANK'] == '1': signal_at_step(5, 9)\n"
        "from pipeline.errors import run_command\n"
        "from stages.train_student import main\n"
        "sys.exit(run_command(main))\n"
    )
    script = tmp_path / "dies.py"
    script.write_text(code)
    folder = tmp_path / "student"
    env = {"PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])}
    result = run_python(
        [*TORCHRUN, script, *flags, *sizes, "--output_dir", folder], env=env, timeout=200
    )
    assert result.code != 0
    assert not (folder / "model").exists()
    result = _launch(TORCHRUN, [*flags, *sizes], folder)
    assert f"resuming after step 4 of {STEPS}" in result.err
    _same(folder, one_process)
