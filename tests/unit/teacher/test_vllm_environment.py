"""What must not stop vLLM: CUDA opened too early, numba, samples of the model's length."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numba
import pytest
import torch
from llvmlite.binding import ffi

from pipeline.teacher.engines.vllm import vllm_info
from pipeline.teacher.engines.vllm_start import (
    let_vllm_look_at_llvmlite,
    let_vllm_read_all_positions,
    set_environment,
)
from pipeline.teacher.settings import TeacherSettings
from tests.stage_runner import ROOT

BEFORE_CUDA = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is set here end with the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.mark.usefixtures("own_environment")
def test_cuda_is_not_opened_before_vllm_can_start_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str | None]] = []

    def is_available() -> bool:
        seen.append({name: os.environ.get(name) for name in BEFORE_CUDA})
        return False

    for name in (*BEFORE_CUDA, "DISTILL_DEVICE"):
        os.environ.pop(name, None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a machine with a GPU that is said to be none
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    vllm_info(TeacherSettings(model="any", tensor_parallel_size=2))
    assert seen == [BEFORE_CUDA]


@pytest.mark.usefixtures("own_environment")
def test_what_the_user_has_set_stays() -> None:
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "forkserver"
    os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    set_environment("cuda")
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "forkserver"
    # Batches that depend on when requests arrive are not the same batches.
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


ORPHAN = """
import multiprocessing, os, sys, time

def worker():
    from pipeline.teacher.engines.vllm_plugin import register
    register()
    print("up", os.getpid(), flush=True)
    time.sleep(600)  # hangs, as in a kernel

if __name__ == "__main__":
    from pipeline.teacher.engines.vllm_start import set_environment
    set_environment("cpu")
    process = multiprocessing.get_context("spawn").Process(target=worker)
    process.start()
    time.sleep(600)
"""


def test_a_worker_that_hangs_ends_with_the_stage(tmp_path: object) -> None:
    file = os.path.join(str(tmp_path), "orphan.py")
    with open(file, "w", encoding="utf-8") as script:
        script.write(ORPHAN)
    stage = subprocess.Popen(
        [sys.executable, file], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert stage.stdout is not None
    word, pid = stage.stdout.readline().split()
    assert word == "up"
    stage.kill()  # as os._exit: no clean-up of any kind
    stage.wait()
    until = time.monotonic() + 10
    while time.monotonic() < until and _lives(int(pid)):
        time.sleep(0.02)
    assert not _lives(int(pid))


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_library_object_has_no_attributes_but_its_functions() -> None:
    for _ in range(2):
        let_vllm_look_at_llvmlite()
        assert not hasattr(ffi.lib, "__dict__")
        with pytest.raises(AttributeError):
            ffi.lib.LLVMPY_NoSuchFunction  # noqa: B018
    assert ffi.lib.LLVMPY_GetVersionInfo() > 0
    assert numba.njit(lambda x: x + 1)(2) == 3


@pytest.mark.parametrize(
    ("config", "max_length", "is_set"),
    [
        ({"max_position_embeddings": 512}, 512, True),
        ({"text_config": {"max_position_embeddings": 512}}, 512, True),
        ({"n_positions": 512}, 512, True),
        ({"max_position_embeddings": 512}, 511, False),
        ({"max_position_embeddings": 512}, 513, False),  # refused before, and by vLLM
        ({}, 512, False),
    ],
)
def test_samples_may_be_as_long_as_the_model_has_positions(
    config: dict[str, object], max_length: int, is_set: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", raising=False)
    let_vllm_read_all_positions(config, max_length)
    assert (os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") == "1") == is_set
    # What was set here is not left to other tests.
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", raising=False)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("inside", [False, True], ids=["whole", "part of a larger tensor"])
def test_each_head_is_rotated_by_its_tokens_position(*, neox: bool, inside: bool) -> None:
    """DeepSeek and LFM2 hand [tokens, heads, size] to the kernel, others [tokens, heads * size]."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    from pipeline.teacher.engines.vllm_rotary import let_vllm_rotate_each_head

    current_platform.import_kernels()
    let_vllm_rotate_each_head()
    tokens, heads, size = 7, 4, 32
    positions = torch.arange(tokens)
    angles = positions[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
    cache = torch.cat([angles.cos(), angles.sin()], -1)
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn((tokens, heads, 2 * size), generator=draw)
    wide_key = torch.randn((tokens, 1, 2 * size), generator=draw)
    query, key = wide[..., size:], wide_key[..., size:]
    if not inside:
        query, key = query.contiguous(), key.contiguous()
    flat_query = query.reshape(tokens, -1).clone()
    flat_key = key.reshape(tokens, -1).clone()
    untouched = wide[..., :size].clone()
    ops.rotary_embedding(positions, flat_query, flat_key, size, cache, neox)
    ops.rotary_embedding(positions, query, key, size, cache, neox)
    assert torch.equal(query.reshape(tokens, -1), flat_query)
    assert torch.equal(key.reshape(tokens, -1), flat_key)
    assert torch.equal(wide[..., :size], untouched)


@pytest.mark.usefixtures("own_environment")
@pytest.mark.parametrize(
    ("cores", "processes", "bound"),
    [((0, 1, 4), 1, "0,1,4"), ((0, 1, 4), 2, "0,4|1"), ((3,), 2, "nobind")],
)
def test_processes_of_a_cpu_share_its_cores(
    cores: tuple[int, ...], processes: int, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM refuses one list for two processes: tensor parallel on a CPU did not start."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
    os.environ.pop("VLLM_CPU_OMP_THREADS_BIND", None)
    set_environment("cpu", processes=processes)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == bound


def test_pods_have_what_must_be_set_before_cuda() -> None:
    pod = (ROOT / "k8s" / "base" / "teacher.yaml").read_text(encoding="utf-8")
    for name, value in BEFORE_CUDA.items():
        _, found, rest = pod.partition(f"name: {name}\n")
        assert found, name
        assert value in rest.splitlines()[0], name
