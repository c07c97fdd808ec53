"""Gradient error over bytes per token of every scheme, on the same real teacher outputs.

`make bench-fidelity` prints the table, writes the plot, and ends with the figures. The error is
that of the gradient on the head's WEIGHT after summing over all tokens, relative to the dense KL's:
what an optimiser step sees. Every scheme of this project runs through the real thing: sampler,
codec and Parquet (whose bytes are counted, all target columns included), reader, collation, and
the loss that trains. The peers' losses are rebuilt from their documents, on exact log-probs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.law import SamplingLaw
from pipeline.data.collate import Batch
from pipeline.loss.sparse_kl import LossSpec, sparse_loss_
from pipeline.teacher.sparsify import SparseScheme
from tests.bench import fidelity_peers as peers
from tests.bench.fidelity_cache import head_targets, through_the_cache
from tests.bench.fidelity_data import Hidden, hidden_states

CHUNK = 256
GRID = (1.0, 2.0)
SHORT, LONG = 8192, 65_536

SCHEMES = {
    "top-16 + bucket": SparseScheme(16, GRID),
    "top-64 + bucket": SparseScheme(64, GRID),
    **{
        f"threshold, tau = 1/{n}": SparseScheme(0, (1.0,), SamplingLaw((1.0,), (1 / n,)))
        for n in (8, 16, 30, 40, 50, 100, 200)
    },
    **{
        f"threshold, tau = 1/{a}, 1/{b}": SparseScheme(0, GRID, SamplingLaw(GRID, (1 / a, 1 / b)))
        for a, b in ((8, 15), (12, 25), (16, 30), (25, 50))
    },
    "top-8 + drawn tail": SparseScheme(8, GRID, SamplingLaw(GRID, (1 / 12, 1 / 25))),
}
T1_SCHEME, T2_SCHEME, BUCKET = (
    "threshold, tau = 1/40",
    "threshold, tau = 1/12, 1/25",
    ("top-64 + bucket"),
)


@dataclass(slots=True)
class Errors:
    """Sums of gradient differences of one scheme."""

    entries: float = 0.0
    bytes_per_token: float = 0.0
    sums: dict[float, Tensor] = field(default_factory=dict)


def run(
    hidden: Hidden, schemes: dict[str, SparseScheme], temperatures: tuple[float, ...]
) -> dict[str, tuple[float, float, dict[float, float]]]:
    """Return entries, bytes and the relative error at each temperature, by scheme."""
    weight_VD = torch.from_numpy(hidden.weight_VD)
    batches: dict[str, Batch] = {}
    results: dict[str, Errors] = {}
    for name, scheme in schemes.items():
        cached = through_the_cache(hidden, weight_VD, scheme)
        results[name] = Errors(cached.entries, cached.bytes_per_token)
        for temperature in temperatures:
            if temperature in scheme.temperatures:
                batches[f"{name}@{temperature}"] = cached.batch(temperature)
    dense = {t: torch.zeros_like(weight_VD) for t in temperatures}
    extra = _peers() if 1.0 in temperatures and len(schemes) > 3 else {}
    for name, (entries, size, _) in extra.items():
        results[name] = Errors(entries, size)
    for start in range(0, len(hidden.gold_N), CHUNK):
        rows = slice(start, start + CHUNK)
        teacher_RV = torch.from_numpy(hidden.teacher_ND[rows]).float() @ weight_VD.t()
        h_RD = torch.from_numpy(hidden.student_ND[rows]).float()
        student_RV = h_RD @ weight_VD.t()
        p_1_RV = torch.softmax(teacher_RV, -1)
        for temperature in temperatures:
            q_RV = torch.softmax(student_RV / temperature, -1)
            exact_RV = q_RV - torch.softmax(teacher_RV / temperature, -1)
            dense[temperature] += exact_RV.t() @ h_RD
            for name, result in results.items():
                if name in extra:
                    gradient_RV = extra[name][2](p_1_RV, q_RV, temperature, start)
                else:
                    batch = batches.get(f"{name}@{temperature}")
                    if batch is None:
                        continue
                    gradient_RV = _gradient(student_RV, batch, rows, temperature, schemes[name])
                error_VD = gradient_RV.sub_(exact_RV).t() @ h_RD
                known = result.sums.get(temperature)
                result.sums[temperature] = error_VD if known is None else known.add_(error_VD)
    return {
        name: (
            result.entries,
            result.bytes_per_token,
            {t: float(error.norm() / dense[t].norm()) for t, error in result.sums.items()},
        )
        for name, result in results.items()
    }


def _gradient(
    student_RV: Tensor, batch: Batch, rows: slice, temperature: float, scheme: SparseScheme
) -> Tensor:
    """Return d KL / d (z / T) of the loss that trains, from the cache's targets."""
    logits_RV = student_RV.clone()
    targets = head_targets(batch).rows(rows.start, rows.stop)
    spec = LossSpec(temperature, alpha=1.0, tail="auto", drawn_log_step=scheme.grids.drawn_step)
    sparse_loss_(logits_RV, targets, spec)
    return logits_RV.div_(temperature)


_Peer = Callable[[Tensor, Tensor, float, int], Tensor]


def _peers() -> dict[str, tuple[float, float, _Peer]]:
    """Return entries, bytes (documented layouts, at this vocabulary) and gradient of the peers."""

    def kept(p_1_RV: Tensor, k: int) -> Tensor:
        mask_RV = torch.zeros_like(p_1_RV, dtype=torch.bool)
        return mask_RV.scatter_(1, p_1_RV.topk(k, -1).indices, True)

    return {
        # DistillKit: k ids of 16 bits, 16 exact bf16, 6 float32 terms / 1 exact, few terms.
        "DistillKit recommended (k=128, zero)": (
            128, 312, lambda p, q, t, _: peers.zero(p, kept(p, 128), q, t)
        ),
        "DistillKit budget (k=50, zero)": (
            50, 114, lambda p, q, t, _: peers.zero(p, kept(p, 50), q, t)
        ),
        "Axolotl (k=64, 64-bit lists)": (
            64, 1024, lambda p, q, t, _: peers.zero(p, kept(p, 64), q, t)
        ),
        "verl (k=64, fp16 + int32)": (
            64, 384, lambda p, q, t, _: peers.unnormalised(p, kept(p, 64), q, t)
        ),
        "ms-swift (k=64, renormalised)": (
            64, 384, lambda p, q, t, _: peers.renormalised_both(p, kept(p, 64), q, t)
        ),
        "random-sampling KD (50 draws)": (
            17, 50, lambda p, q, t, at: peers.draws(p, 50, q, t, at)
        ),
    }  # fmt: skip


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--plot", type=Path, default=None, help="write the plot here (PNG)")
    parser.add_argument("--short", type=int, default=SHORT)
    parser.add_argument("--long", type=int, default=LONG)
    arguments = parser.parse_args()
    hidden = hidden_states(max(arguments.short, arguments.long), model=arguments.model)
    short = hidden.head(arguments.short)
    table = run(short, SCHEMES, GRID)
    long = run(
        hidden.head(arguments.long),
        {name: SCHEMES[name] for name in (T2_SCHEME, BUCKET)},
        (2.0,),
    )
    print(f"{len(short.gold_N)} tokens, V = {len(hidden.weight_VD)}; weight-gradient error, %")
    print(f"{'scheme':<38} {'entries':>8} {'bytes':>7} {'T = 1':>7} {'T = 2':>7}")
    for name, (entries, size, errors) in table.items():
        cells = [f"{100 * errors[t]:7.2f}" if t in errors else "      -" for t in GRID]
        print(f"{name:<38} {entries:8.1f} {size:7.1f} {' '.join(cells)}")
    print(f"{arguments.long} tokens, T = 2")
    for name, (_, size, errors) in long.items():
        print(f"{name:<38} {'':>8} {size:7.1f} {'':>7} {100 * errors[2.0]:7.2f}")
    if arguments.plot is not None:
        from tests.bench.fidelity_plot import plot

        plot(table, arguments.plot, tokens=len(short.gold_N))
    at_4 = _bytes_at(table, 0.04)
    print(f"FIGURE target_bytes_at_4_percent {at_4:.2f}")
    print(f"FIGURE weight_gradient_error_t1_percent {100 * table[T2_SCHEME][2][1.0]:.2f}")
    print(f"FIGURE t2_error_over_bucket64 {long[T2_SCHEME][2][2.0] / long[BUCKET][2][2.0]:.3f}")
    print(f"FIGURE t2_bytes_over_bucket64 {long[T2_SCHEME][1] / long[BUCKET][1]:.3f}")


def _bytes_at(table: dict[str, tuple[float, float, dict[float, float]]], error: float) -> float:
    """Interpolate, in logarithms, the bytes at which the T = 1 threshold schemes reach `error`."""
    points = sorted(
        (errors[1.0], size)
        for name, (_, size, errors) in table.items()
        if name.startswith("threshold") and 2.0 not in errors
    )
    found, sizes = np.log([p[0] for p in points]), np.log([p[1] for p in points])
    return float(np.exp(np.interp(np.log(error), found, sizes)))


if __name__ == "__main__":
    main()
