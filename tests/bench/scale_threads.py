"""The sparsifier with two threads over one, where every core has another busy process.

`python -m tests.bench.scale_threads` sparsifies rows of V = 49,152 in the head's chunks of 256, in
alternating rounds: with one thread and with two, by blocks (`pipeline/cpu_blocks.py`),
and in torch, with each operation divided among the threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.noise import row_noise
from pipeline.sampling.quantisation import SAMPLED_QUANTISATION
from pipeline.teacher.sparsify.device import SparseScheme, sparsify
from pipeline.teacher.sparsify.gpu.chains import chained_sparsify

VOCABULARY, HEAD_ROWS = 49_152, 256
SCHEMES = {
    "top-64, T = 1 and 2": SparseScheme(64, (1.0, 2.0)),
    "threshold, T = 1 and 2": SparseScheme(
        0, (1.0, 2.0), InclusionRule((1.0, 2.0), (1 / 9, 1 / 23.5)), SAMPLED_QUANTISATION
    ),
}
# Bound to one core, and never waiting: the scheduler has to share every core.
_BUSY = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"

Sparsifier = Callable[[torch.Tensor, torch.Tensor, SparseScheme, torch.Tensor], torch.Tensor]


def divided(
    logits_RV: torch.Tensor, label_R: torch.Tensor, scheme: SparseScheme, noise_R: torch.Tensor
) -> torch.Tensor:
    """Reduce all rows in torch, each operation divided among its threads."""
    return chained_sparsify(logits_RV, label_R, scheme, noise_R, compiled=False)


@contextmanager
def busy_cores() -> Iterator[None]:
    """Keep one process busy on each core that this one may use."""
    neighbours = [
        subprocess.Popen([sys.executable, "-c", _BUSY, str(core)])
        for core in sorted(os.sched_getaffinity(0))
    ]
    try:
        time.sleep(0.5)  # until they have started
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def measure(scheme: SparseScheme, *, rows: int, rounds: int) -> dict[str, list[float]]:
    """Return the ms a row of each way in each round."""
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(HEAD_ROWS, VOCABULARY, generator=generator) * 3
    label_R = torch.randint(VOCABULARY, (HEAD_ROWS,), generator=generator)
    noise_R = torch.from_numpy(row_noise(1, np.arange(HEAD_ROWS)))
    ways: dict[str, tuple[Sparsifier, int]] = {
        "one thread": (sparsify, 1),
        "two threads": (sparsify, 2),
        "divided, one thread": (divided, 1),
        "divided, two threads": (divided, 2),
    }
    before = torch.get_num_threads()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    try:
        for round_ in range(rounds + 1):  # the first is a warm-up
            for name, (way, threads) in ways.items():
                torch.set_num_threads(threads)
                started = time.perf_counter()
                # Once suffices for what took up to 47 ms a row.
                calls = rows // HEAD_ROWS if way is sparsify else 1
                for _ in range(calls):
                    way(logits_RV, label_R, scheme, noise_R)
                if round_:
                    seconds = time.perf_counter() - started
                    taken[name].append(1000 * seconds / (calls * HEAD_ROWS))
    finally:
        torch.set_num_threads(before)
    return taken


def sparsifier_two_threads_over_one(*, rows: int = 1024, rounds: int = 5) -> dict[str, float]:
    """Print a table; return the larger median ratio of both schemes, now and as before."""
    ratios: dict[str, list[float]] = {"": [], "_divided": []}
    print(f"sparsifier, V = {VOCABULARY}, {rows} rows, {rounds} rounds, every core busy")
    print(f"{'':<26}{'way':<22}{'ms a row':>9}{'least':>8}{'most':>8}")
    with busy_cores():
        for name, scheme in SCHEMES.items():
            taken = measure(scheme, rows=rows, rounds=rounds)
            for way, ms in taken.items():
                print(f"{name:<26}{way:<22}{statistics.median(ms):>9.3f}{min(ms):>8.3f}"
                      f"{max(ms):>8.3f}")  # fmt: skip
            for suffix, way in (("", ""), ("_divided", "divided, ")):
                both = zip(taken[f"{way}two threads"], taken[f"{way}one thread"], strict=True)
                ratios[suffix].append(statistics.median(two / one for two, one in both))
    return {
        f"sparsifier_two_threads_over_one{suffix}": max(found) for suffix, found in ratios.items()
    }


def figures() -> dict[str, float]:
    """Return what `make bench-scale` shows."""
    return sparsifier_two_threads_over_one()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    found = sparsifier_two_threads_over_one(rows=arguments.rows, rounds=arguments.rounds)
    for name, value in found.items():
        print(f"FIGURE {name} {value:.3f}")


if __name__ == "__main__":
    main()
