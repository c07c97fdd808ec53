"""Gradient error against bytes per token of every scheme, on the same teacher outputs.

`make bench-fidelity` prints the table, writes the plot, and ends with the figures. The error is
that of the gradient on the head's WEIGHT after summing over all tokens, relative to the dense KL's,
as an optimiser step sees it. Every scheme of this project runs through the production code:
sampler, codec and Parquet (bytes of all target columns), reader, collation, and the training loss.
The peers' losses are reimplemented from their documents, on exact log-probs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data.collate import Batch
from pipeline.loss.chunk_gradient import LossSpec, sparse_loss_
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.quantisation import SAMPLED_QUANTISATION
from pipeline.teacher.sparsify.device import SparseScheme
from pipeline.teacher.sparsify.scheme import OVERSAMPLING
from tests.bench import fidelity_peers as peers
from tests.bench.fidelity_cache import head_targets, through_the_cache
from tests.bench.fidelity_data import Hidden, hidden_states
from tests.bench.fidelity_plot import plot, save

CHUNK = 64
"""Rows at a time: 12 MB of logits at V = 49,152, which fit the processor's cache."""
GRID = (1.0, 2.0)
SKETCH = 64
"""Weight gradients are compared along this many of the 576 hidden dimensions, to save time. This
changes the errors by 1 to 2 % of their value."""
SHORT, LONG, DRAWS = 8192, 65_536, 4


def sampled(*taus: float, top_k: int = 0) -> SparseScheme:
    """Return the scheme of one tau a temperature, as `capture.scheme` makes it."""
    grid = GRID[: len(taus)]
    return SparseScheme(
        top_k, grid, InclusionRule(grid, taus), SAMPLED_QUANTISATION, oversampling=OVERSAMPLING
    )


SCHEMES = {
    "top-16 + bucket": SparseScheme(16, GRID),
    "top-64 + bucket": SparseScheme(64, GRID),
    **{f"threshold, tau = 1/{n}": sampled(1 / n) for n in (8, 16, 28, 64, 128)},
    **{
        f"threshold, tau = 1/{a}, 1/{b}": sampled(1 / a, 1 / b)
        for a, b in ((5, 12), (9, 23.5), (19, 50))
    },
    "top-8 + sampled tail": sampled(1 / 9, 1 / 23.5, top_k=8),
}
T2_SCHEME, BUCKET = "threshold, tau = 1/9, 1/23.5", "top-64 + bucket"


@dataclass(slots=True)
class Errors:
    """Sums of gradient differences of one scheme."""

    entries: float = 0.0
    bytes_per_token: float = 0.0
    sums: dict[tuple[float, int], Tensor] = field(default_factory=dict)
    """By temperature and sample."""
    at: dict[float, list[float]] = field(default_factory=dict)
    """By temperature: the relative error after each requested number of tokens, root mean
    square over draws."""

    def add(self, temperature: float, error_RV: Tensor, h_RS: Tensor, *, draw: int = 0) -> None:
        """Add the errors of a chunk of tokens: gradients on the logits times hidden states."""
        if (temperature, draw) not in self.sums:
            self.sums[temperature, draw] = error_RV.t() @ h_RS
        else:
            self.sums[temperature, draw].addmm_(error_RV.t(), h_RS)

    def note(self, dense: Errors) -> None:
        """Note the errors so far, relative to the dense gradients."""
        squares: dict[float, list[float]] = {}
        for (temperature, _), error_VS in self.sums.items():
            error = float(error_VS.norm() / dense.sums[temperature, 0].norm())
            squares.setdefault(temperature, []).append(error**2)
        for temperature, found in squares.items():
            self.at.setdefault(temperature, []).append(float(np.sqrt(np.mean(found))))


Table = dict[str, Errors]
MOST_KEPT = 128
"""Of the peers."""


def run(
    hidden: Hidden,
    schemes: dict[str, SparseScheme],
    temperatures: tuple[float, ...],
    *,
    marks: tuple[int, ...] = (),
    peers_too: bool = True,
    draws: int = DRAWS,
) -> Table:
    """Return entries, bytes and relative errors of every scheme.

    Args:
        hidden: the tokens.
        schemes: by name.
        temperatures: of the student's loss.
        marks: numbers of tokens after which errors are noted; after all of them in any case.
        peers_too: the other tools' losses as well.
        draws: samples of a scheme with sampled entries; a single one is off by about 5 %.
    """
    weight_VD = torch.from_numpy(hidden.weight_VD)
    tokens, width = len(hidden.label_N), weight_VD.shape[1]
    generator = torch.Generator().manual_seed(0)
    sketch_DS = torch.linalg.qr(torch.randn(width, SKETCH, generator=generator)).Q
    batches: dict[tuple[str, float], list[Batch]] = {}
    table: Table = {}
    for name, scheme in schemes.items():
        for draw in range(draws if scheme.rule else 1):
            cached = through_the_cache(hidden.redrawn(draw), weight_VD, scheme)
            table.setdefault(name, Errors(cached.entries, cached.bytes_per_token))
            for temperature in temperatures:
                if temperature in scheme.temperatures:
                    batch = cached.batch(temperature)
                    batches.setdefault((name, temperature), []).append(batch)
    dense = Errors()
    extra = _peers() if peers_too else {}
    for name, (entries, size, _) in extra.items():
        table[name] = Errors(entries, size)
    ends = sorted({*marks, tokens})
    for start in range(0, tokens, CHUNK):
        rows = slice(start, min(start + CHUNK, tokens))
        teacher_RV = torch.from_numpy(hidden.teacher_ND[rows]).float() @ weight_VD.t()
        h_RD = torch.from_numpy(hidden.student_ND[rows]).float()
        student_RV, h_RS = h_RD @ weight_VD.t(), h_RD @ sketch_DS
        p_1_RV = torch.softmax(teacher_RV, -1)
        top_RK = p_1_RV.topk(MOST_KEPT, -1).indices if extra else None
        for temperature in temperatures:
            q_RV = torch.softmax(student_RV / temperature, -1)
            exact_RV = q_RV - torch.softmax(teacher_RV / temperature, -1)
            dense.add(temperature, exact_RV, h_RS)
            for name, result in table.items():
                if name in extra:
                    gradient_RV = extra[name][2](p_1_RV, top_RK, q_RV, temperature, start)
                    result.add(temperature, gradient_RV.sub_(exact_RV), h_RS)
                for draw, batch in enumerate(batches.get((name, temperature), ())):
                    gradient_RV = _gradient(student_RV, batch, rows, temperature, schemes[name])
                    result.add(temperature, gradient_RV.sub_(exact_RV), h_RS, draw=draw)
        while ends and rows.stop >= ends[0]:
            ends.pop(0)
            for result in table.values():
                result.note(dense)
            if marks:
                _line(table, rows.stop)
    return table


def _line(table: Table, tokens: int) -> None:
    """Print the errors so far, so that a run that is stopped has printed results."""
    cells = [
        f"{name} {', '.join(f'{100 * errors[-1]:.2f}' for errors in row.at.values())}"
        for name, row in table.items()
    ]
    print(f"{tokens} tokens, error in %: {'; '.join(cells)}", flush=True)


def _gradient(
    student_RV: Tensor, batch: Batch, rows: slice, temperature: float, scheme: SparseScheme
) -> Tensor:
    """Return d KL / d (z / T) of the training loss, from the cache's targets."""
    logits_RV = student_RV.clone()
    targets = head_targets(batch).rows(rows.start, rows.stop)
    highest = scheme.rule.highest if scheme.rule else 0.0
    spec = LossSpec(
        temperature,
        1.0,
        "auto",
        sampled_log_step=scheme.quantisation.sampled_step,
        rule_highest=highest,
    )
    sparse_loss_(logits_RV, targets, spec)
    return logits_RV.div_(temperature)


_Peer = Callable[[Tensor, Tensor | None, Tensor, float, int], Tensor]


def _peers() -> dict[str, tuple[float, float, _Peer]]:
    """Return entries, bytes (documented layouts, at this vocabulary) and gradient of the peers."""

    def top(loss: Callable[[Tensor, Tensor, Tensor, float], Tensor], k: int) -> _Peer:
        def gradient(
            p_1_RV: Tensor, top_RK: Tensor | None, q_RV: Tensor, temperature: float, start: int
        ) -> Tensor:
            assert top_RK is not None
            kept_RV = torch.zeros_like(p_1_RV, dtype=torch.bool).scatter_(1, top_RK[:, :k], True)
            return loss(p_1_RV, kept_RV, q_RV, temperature)

        return gradient

    return {
        # DistillKit: k ids of 16 bits, 16 exact bf16, 6 float32 terms / 1 exact, few terms.
        "DistillKit recommended (k=128, zero)": (128, 312, top(peers.zero, 128)),
        "DistillKit budget (k=50, zero)": (50, 114, top(peers.zero, 50)),
        "Axolotl (k=64, 64-bit lists)": (64, 1024, top(peers.zero, 64)),
        "verl (k=64, fp16 + int32)": (64, 384, top(peers.unnormalised, 64)),
        "ms-swift (k=64, renormalised)": (64, 384, top(peers.renormalised_both, 64)),
        "random-sampling KD (50 draws)": (
            17, 50, lambda p, _, q, t, at: peers.draws(p, 50, q, t, at)
        ),
    }  # fmt: skip


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="teacher: `embedded` or a model folder")
    parser.add_argument("--dropped", default="12,20", help="layers removed from the student")
    parser.add_argument("--plot", type=Path, default=None, help="write the plot here (PNG or SVG)")
    parser.add_argument("--short", type=int, default=SHORT, help="tokens of the table; 0: none")
    parser.add_argument("--long", type=int, default=LONG, help="tokens at T = 2; 0: none")
    parser.add_argument(
        "--draws", type=int, default=DRAWS, help="of each scheme with sampled entries"
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the tokens, no figures")
    arguments = parser.parse_args()
    short, long = arguments.short, arguments.long
    if arguments.quick:
        short, long = short // 8, long // 8
    dropped = tuple(map(int, arguments.dropped.split(",")))
    hidden = hidden_states(max(short, long), model=arguments.model, dropped=dropped)
    if short:
        _short(hidden, short, arguments.draws)
    if long:
        _long(hidden, long, arguments.draws)
    if arguments.plot:
        plot(arguments.plot)


def _short(hidden: Hidden, tokens: int, draws: int) -> None:
    """Print the table of all schemes."""
    table = run(hidden.head(tokens), SCHEMES, GRID, draws=draws)
    print(f"{tokens} tokens, V = {len(hidden.weight_VD)}; weight-gradient error, % of dense KL's")
    print(f"{'scheme':<38} {'entries':>8} {'bytes':>7} {'T = 1':>7} {'T = 2':>7}")
    for name, row in table.items():
        cells = [f"{100 * row.at[t][-1]:7.2f}" if t in row.at else "      -" for t in GRID]
        print(f"{name:<38} {row.entries:8.1f} {row.bytes_per_token:7.1f} {' '.join(cells)}")
    save(table, "short", (tokens,))
    print(f"FIGURE target_bytes_at_4_percent {_bytes_at(table, 0.04):.2f}", flush=True)
    print(f"FIGURE weight_gradient_error_t1_percent {100 * table[T2_SCHEME].at[1.0][-1]:.2f}")


def _long(hidden: Hidden, tokens: int, draws: int) -> None:
    """Show that the error of sampled targets falls as 1 / sqrt(tokens) and the bucket's does
    not."""
    marks = tuple(tokens // n for n in (16, 8, 4, 2))
    schemes = {name: SCHEMES[name] for name in (T2_SCHEME, BUCKET)}
    print("T = 2")
    table = run(hidden.head(tokens), schemes, (2.0,), marks=marks, peers_too=False, draws=draws)
    print(", ".join(f"{name}: {row.bytes_per_token:.1f} bytes" for name, row in table.items()))
    sampled, bucket = table[T2_SCHEME], table[BUCKET]
    counts = (*marks, tokens)
    save(table, "long", counts)
    errors = [_at(LONG, counts, row.at[2.0]) for row in (sampled, bucket)]
    if tokens != LONG:
        print(f"fitted at {LONG} tokens: " + ", ".join(f"{100 * error:.2f}" for error in errors))
    print(f"FIGURE t2_error_over_bucket64 {errors[0] / errors[1]:.3f}")
    print(f"FIGURE t2_bytes_over_bucket64 {sampled.bytes_per_token / bucket.bytes_per_token:.3f}")


def _at(tokens: int, counts: tuple[int, ...], errors: list[float]) -> float:
    """Return the error after `tokens`: as measured, else by error^2 = noise / tokens + bias."""
    if tokens in counts:
        return errors[counts.index(tokens)]
    # The uncertainty of each point is proportional to it, so relative errors are fitted.
    design_MP = np.stack([1 / np.array(counts), np.ones(len(counts))], axis=1)
    squares_M = np.square(errors)
    noise, bias = np.linalg.lstsq(design_MP / squares_M[:, None], np.ones(len(counts)))[0]
    return float(np.sqrt(max(noise, 0) / tokens + max(bias, 0)))


def _bytes_at(table: Table, error: float) -> float:
    """Interpolate, in logarithms, the bytes at which the rules of T = 1 alone reach `error`."""
    points = sorted(
        (row.at[1.0][-1], row.bytes_per_token)
        for name, row in table.items()
        if name.startswith("threshold") and 2.0 not in row.at
    )
    found, sizes = np.log([p[0] for p in points]), np.log([p[1] for p in points])
    return float(np.exp(np.interp(np.log(error), found, sizes)))


if __name__ == "__main__":
    main()
