"""Blocks of rows on several threads: the same bits, one torch thread each, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import cpu_blocks as blocks
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.noise import row_noise
from pipeline.sampling.quantisation import SAMPLED_QUANTISATION
from pipeline.teacher.sparsify.device import SparseScheme, sparsify

ROOT = Path(__file__).resolve().parents[3]
SCHEMES = {
    "top-k": SparseScheme(64, (1.0, 2.0)),
    "threshold": SparseScheme(
        0, (1.0, 2.0), InclusionRule((1.0, 2.0), (1 / 12, 1 / 25)), SAMPLED_QUANTISATION
    ),
}
VOCAB = 49_152


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _rows(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return tensor.split(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMES)
def test_any_number_of_threads_gives_the_same_bits(
    name: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(41, VOCAB, generator=generator) * 3).to(dtype)  # the last row is alone
    label = torch.randint(VOCAB, (41,), generator=generator)
    noise = torch.from_numpy(row_noise(7, np.arange(41)))
    scheme = SCHEMES[name]
    threads(1)
    before = torch.cat(
        [
            sparsify(z, g, scheme, n)
            for z, g, n in zip(*map(_rows, (logits, label, noise)), strict=True)
        ]
    )
    for number in (1, 2, 4):
        threads(number)
        assert torch.equal(sparsify(logits, label, scheme, noise), before), number
        for rows in (1, 2, 11):
            some = sparsify(logits[:rows], label[:rows], scheme, noise[:rows])
            assert torch.equal(some, before[:rows]), (number, rows)
        with torch.inference_mode():
            inside = sparsify(logits.clone(), label, scheme, noise)
            assert torch.equal(inside, before)
            assert inside.is_inference()
    assert not sparsify(logits.float().requires_grad_(), label, scheme, noise).requires_grad


def test_blocks_run_side_by_side_with_one_torch_thread_each(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # as vLLM's CPU worker does
    meeting = threading.Barrier(2, timeout=60)
    seen: list[tuple[int, int, bool, bool]] = []

    def open_worker() -> Callable[[int], None]:
        def run(_: int) -> None:
            meeting.wait()
            threads_here = torch.get_num_threads()
            modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
            seen.append((threading.get_ident(), threads_here, *modes))

        return run

    with torch.inference_mode():
        blocks.for_each_block(range(2), open_worker)
    assert len({ident for ident, *_ in seen}) == 2
    assert threading.get_ident() in {ident for ident, *_ in seen}
    assert [rest for _, *rest in seen] == [[1, True, False]] * 2
    assert torch.get_num_threads() == 2, "the calling thread has its number again"
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_a_single_block_starts_no_thread(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pool() -> None:
        raise AssertionError("a single block needs no other thread")

    monkeypatch.setattr(blocks, "_pool", pool)
    seen: list[int] = []
    threads(4)
    blocks.for_each_block([5], lambda: lambda start: seen.extend((start, torch.get_num_threads())))
    assert seen == [5, 1]
    threads(1)
    blocks.for_each_block(range(3), lambda: seen.append)
    assert seen == [5, 1, 0, 1, 2]


@pytest.mark.parametrize("where", ["caller", "helper"])
def test_an_error_ends_the_call_and_the_next_one_works(
    where: str, threads: Callable[[int], None]
) -> None:
    threads(2)
    caller, meeting, done = threading.get_ident(), threading.Barrier(2, timeout=60), []

    def open_worker() -> Callable[[int], None]:
        mine = "caller" if threading.get_ident() == caller else "helper"

        def run(start: int) -> None:
            if start < 2:
                meeting.wait()  # each thread has one of the first two blocks
                if mine == where:
                    raise IndexError(where)
            done.append(start)

        return run

    with pytest.raises(IndexError, match=where):
        blocks.for_each_block(range(1000), open_worker)
    assert torch.get_num_threads() == 2
    done.clear()
    blocks.for_each_block(range(50), lambda: done.append)
    assert sorted(done) == list(range(50))


BOUND = """
import ctypes, json, os, sys, threading, torch
from pathlib import Path
from pipeline.cpu_blocks import for_each_block

mkl = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
choice = getattr(mkl, "mkl_serv_get_dynamic", lambda: 1)
x = torch.ones(20, 50_000)
torch.exp(x)
before, number = choice(), torch.get_num_threads()
meeting = threading.Barrier(number, timeout=60)
cores = {}

def open_worker():
    def run(start):
        meeting.wait()
        torch.exp(x)
        cores[threading.current_thread().name] = sorted(os.sched_getaffinity(0))
    return run

for_each_block(range(number), open_worker)
others = []
thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
thread.start(); thread.join()
assert others == [torch.get_num_threads()] == [number], others
assert choice() == before, "MKL's choice of threads is the process's"

child = os.fork()
if not child:
    seen = []
    for_each_block(range(50), lambda: seen.append)
    os._exit(0 if sorted(seen) == list(range(50)) else 1)
assert os.waitpid(child, 0)[1] == 0
print(json.dumps(cores))
"""


def test_threads_of_a_bound_process_have_cores_of_their_own() -> None:
    """As in a CPU worker of vLLM; there too, nothing of the process is changed, and forks work."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("one core")
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if not libraries:
        pytest.skip("torch brings no libgomp")
    environment = {
        **os.environ, "OMP_NUM_THREADS": "2", "LD_PRELOAD": str(libraries[0]),
        "GOMP_CPU_AFFINITY": " ".join(map(str, cores)), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", BOUND], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert f'"MainThread": [{cores[0]}]' in result.stdout
    assert f'"cpu-blocks_0": [{cores[1]}]' in result.stdout
