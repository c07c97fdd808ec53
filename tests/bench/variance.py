"""Ways to draw a sequence's entries, by the squared error of gradients: ours and the losers.

`make bench-variance`. Every way keeps an entry with the same probability, so that bytes differ by
the counts alone. p is the embedded teacher's, q that of the student without two layers; log p is
not rounded. Errors are summed over the positions of each sequence, which are whole, relative to
one systematic draw a position. With --rules: inclusion rules (`tests.bench.variance_rules`).

Legend: N positions of a sequence, V vocabulary, D hidden, S sketched dimensions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.teacher.sparsify.second_phase import draw_candidates
from tests.bench.fidelity_data import Hidden, hidden_states
from tests.bench.variance_rules import print_rules

Reals = NDArray[np.floating]
Kept = NDArray[np.bool_]
TAU, SHARE, SKETCH = 1 / 28, 0.25, 64
_GOLDEN = (5**0.5 - 1) / 2

Way = Callable[[Reals, np.random.Generator], Kept]


def independent(pi_NV: Reals, random: np.random.Generator) -> Kept:
    """Poisson sampling."""
    return random.random(pi_NV.shape, dtype=np.float32) < pi_NV


def systematic(pi_NV: Reals, random: np.random.Generator, offset_N: Reals | None = None) -> Kept:
    """One offset a position, steps of 1 along the running sum by id."""
    if offset_N is None:
        offset_N = random.random(len(pi_NV))
    marks_NV = np.floor(np.cumsum(pi_NV, axis=1, dtype=np.float64) - offset_N[:, None])
    first_N1 = np.floor(-offset_N)[:, None]
    kept: Kept = np.diff(marks_NV, axis=1, prepend=first_N1) > 0
    return kept


def golden_offsets(pi_NV: Reals, random: np.random.Generator) -> Kept:
    """The same with offsets that follow each other by the golden ratio."""
    return systematic(pi_NV, random, (random.random() + np.arange(len(pi_NV)) * _GOLDEN) % 1)


def golden_tokens(pi_NV: Reals, random: np.random.Generator) -> Kept:
    """A number of each token's own (Ohlsson 1995), moved by the golden ratio from position on."""
    offset_N = random.random() + np.arange(len(pi_NV)) * _GOLDEN
    own_V = random.random(pi_NV.shape[1])
    kept: Kept = (own_V + offset_N[:, None]) % 1 < pi_NV
    return kept


def along_the_sequence(pi_NV: Reals, random: np.random.Generator) -> Kept:
    """Systematic for each token along the positions: needs a number a token, kept in between."""
    start_V = random.random(pi_NV.shape[1])
    marks_NV = np.floor(np.cumsum(pi_NV, axis=0, dtype=np.float64) + start_V)
    kept: Kept = np.diff(marks_NV, axis=0, prepend=np.zeros((1, len(start_V)))) > 0
    return kept


def two_phases(factor: float, *, rounding: bool) -> Way:
    """Return the draw among `factor` times as many candidates of one systematic draw a position.

    With `rounding` that in use; else systematic along all candidates by token and position.
    """

    def way(pi_NV: Reals, random: np.random.Generator) -> Kept:
        first_NV = np.minimum(pi_NV * factor, 1)
        candidates_NV = systematic(np.where(first_NV < 1, first_NV, 0), random) | (first_NV >= 1)
        token_E, position_E = np.nonzero((candidates_NV & (pi_NV > 0)).T)
        share_E = pi_NV[position_E, token_E].astype(np.float64) / first_NV[position_E, token_E]
        if rounding:
            drawn_E = draw_candidates(share_E, position_E, token_E, int(random.integers(1 << 62)))
        else:
            sums_E = np.cumsum(share_E) + random.random()
            drawn_E = np.floor(sums_E) > np.floor(sums_E - share_E)
        kept_NV = np.zeros(pi_NV.shape, bool)
        kept_NV[position_E[drawn_E], token_E[drawn_E]] = True
        return kept_NV

    return way


WAYS: dict[str, Way] = {
    "systematic a position": systematic,
    "  offsets by the golden ratio": golden_offsets,
    "independent": independent,
    "numbers of tokens, moved by the golden ratio": golden_tokens,
    "systematic a token along the sequence": along_the_sequence,
    "two phases, 4 times, systematic": two_phases(4, rounding=False),
    "two phases, 2 times, dependent rounding": two_phases(2, rounding=True),
    "two phases, 4 times, dependent rounding (in use)": two_phases(4, rounding=True),
    "two phases, 8 times, dependent rounding": two_phases(8, rounding=True),
}


def sequences(hidden: Hidden, weight_VD: torch.Tensor) -> Iterator[tuple[Reals, Reals, Reals]]:
    """Yield each sequence's p of the tail, control variate, q (all [N, V]) and hidden [N, D]."""
    start = 0
    for count in hidden.counts_S:
        rows = slice(start, start + count)
        start += count
        student_ND = torch.from_numpy(hidden.student_ND[rows]).float()
        p_NV = torch.softmax(torch.from_numpy(hidden.teacher_ND[rows]).float() @ weight_VD.t(), -1)
        q_NV = torch.softmax(student_ND @ weight_VD.t(), -1)
        tail_NV = p_NV < TAU
        tail_NV.scatter_(1, torch.from_numpy(hidden.label_N[rows])[:, None], False)
        p_NV, tail_q_NV = p_NV * tail_NV, q_NV * tail_NV
        ratio_N1 = p_NV.sum(1, keepdim=True) / tail_q_NV.sum(1, keepdim=True).clamp_(min=1e-9)
        yield p_NV.numpy(), (SHARE * ratio_N1 * tail_q_NV).numpy(), q_NV.numpy(), student_ND.numpy()


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--rules", action="store_true", help="inclusion rules instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hidden = hidden_states(arguments.tokens).head(arguments.tokens)
    weight_VD = torch.from_numpy(hidden.weight_VD)
    if arguments.rules:
        print_rules(hidden, weight_VD)
        return
    generator = torch.Generator().manual_seed(0)
    sketch_DS = torch.linalg.qr(torch.randn(weight_VD.shape[1], SKETCH, generator=generator)).Q
    sums = {name: np.zeros(4) for name in WAYS}
    counts: dict[str, list[Reals]] = {name: [] for name in WAYS}
    for at, (p_NV, control_NV, q_NV, h_ND) in enumerate(sequences(hidden, weight_VD)):
        pi_NV, h_NS = p_NV / TAU, torch.from_numpy(h_ND) @ sketch_DS
        for name, way in WAYS.items():
            for draw in range(arguments.draws):
                kept_NV = way(pi_NV, np.random.default_rng((at, draw))) & (pi_NV > 0)
                counts[name].append(kept_NV.sum(1) - pi_NV.sum(1))
                for place, base_NV in ((0, p_NV), (1, p_NV - control_NV)):
                    error_NV = np.where(kept_NV, base_NV / np.where(pi_NV > 0, pi_NV, 1), 0)
                    error_NV -= base_NV
                    error_NV -= error_NV.sum(1, keepdims=True) * q_NV  # softmax times the sum
                    error = torch.from_numpy(error_NV.astype(np.float32))
                    sums[name][place] += float((error.t() @ h_NS).square().sum())
                below_ND = error @ weight_VD
                sums[name][2] += float(below_ND.square().sum())
                sums[name][3] += float((below_ND.t() @ h_NS).square().sum())
    print(f"{len(hidden.label_N)} tokens, tau 1/28, {arguments.draws} draws; squared errors")
    print(f"{'':<50} {'no cv':>7} {'head':>7} {'hidden':>7} {'sum':>7} {'count sd':>9}")
    for name, total in sums.items():
        cells = " ".join(f"{x:7.3f}" for x in total / sums["systematic a position"])
        print(f"{name:<50} {cells} {np.concatenate(counts[name]).std():9.2f}")


if __name__ == "__main__":
    main()
