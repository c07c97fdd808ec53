"""Inclusion rules by the entries that they need at the squared error of pi = p / tau, exactly.

A part of `tests.bench.variance`. As in `tests.bench.control`, errors are expectations over all
draws, sums over the whole vocabulary. "Best" rules are bounds: of all rules that are functions of
what is named, fitted on the very rows and for the very student that they are judged by.

Legend: N positions, B bins of log p, C classes of tokens by rank, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.loss.sampled_divergence import row_share
from tests.bench.fidelity_data import Hidden

__all__ = ["print_rules"]

Reals = NDArray[np.float64]
TAU, BIN, LOWEST = 1 / 28, 0.125, -32.0
_BINS = int(-LOWEST / BIN)
_RANKS = (16, 64, 256, 1024, 4096, 16384)
_CHUNK = 32
_VALUE_BITS = 2.4
"""Of a sampled entry's code."""


@dataclass(frozen=True, slots=True)
class Sums:
    """By position, bin and class: what squared errors and costs are made of; labels left out."""

    count_NBC: Reals
    square_NBC: Reals
    """|h|^2 (p - kappa q)^2, kappa that of the training loss under pi = p / tau."""
    tail_N: Reals


def _sums(hidden: Hidden, weight_VD: Tensor) -> Sums:
    teacher_ND, student_ND = map(torch.from_numpy, (hidden.teacher_ND, hidden.student_ND))
    mean_V = torch.zeros(len(weight_VD))
    for start in range(0, len(teacher_ND), _CHUNK):
        some = slice(start, start + _CHUNK)
        mean_V += torch.softmax(teacher_ND[some].float() @ weight_VD.t(), -1).sum(0)
    rank_V = torch.empty(len(mean_V), dtype=torch.int64)
    rank_V[mean_V.argsort(descending=True)] = torch.arange(len(mean_V))
    classes = len(_RANKS) + 1
    class_V = torch.bucketize(rank_V, torch.tensor(_RANKS), right=True)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(teacher_ND), _CHUNK):
        some = slice(start, start + _CHUNK)
        h_RD = student_ND[some].float()
        log_p_RV = torch.log_softmax(teacher_ND[some].float() @ weight_VD.t(), -1)
        log_q_RV = torch.log_softmax(h_RD @ weight_VD.t(), -1)
        label_R1 = torch.from_numpy(hidden.label_N[some])[:, None]
        p_RV, q_RV, ratio_RV = log_p_RV.exp(), log_q_RV.exp(), log_p_RV - log_q_RV
        tail_RV = (p_RV < TAU).scatter_(1, label_R1, False)
        p_R, q_R = (p_RV * tail_RV).sum(-1), (q_RV * tail_RV).sum(-1)
        apart_R = (p_RV * ratio_RV * ~tail_RV).sum(-1) + p_R * (p_R / q_R).log()
        spread_R = (p_RV * ratio_RV.square() * ~tail_RV).sum(-1) / (1 - p_R)
        kappa_R1 = (row_share(apart_R, spread_R, 1.0) * p_R / q_R)[:, None]
        norm_R1 = h_RD.square().sum(-1, keepdim=True)
        square_RV = (norm_R1 * (p_RV - kappa_R1 * q_RV).square()).scatter_(1, label_R1, 0.0)
        bin_RV = ((log_p_RV - LOWEST) / BIN).long().clamp_(0, _BINS - 1)
        rows = len(h_RD)
        place_RV = (torch.arange(rows)[:, None] * _BINS + bin_RV) * classes + class_V
        one_RV = torch.ones_like(p_RV).scatter_(1, label_R1, 0.0)
        found = [
            torch.bincount(
                place_RV.reshape(-1), x_RV.reshape(-1).double(), rows * _BINS * classes
            ).reshape(rows, _BINS, classes)
            for x_RV in (one_RV, square_RV)
        ]
        parts.append((found[0], found[1], p_R.double()))
    count, square, tail = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return Sums(count, square, tail)


def _at_the_error(square: Reals, rule: Reals, wanted: float) -> Reals:
    """Return min(1, rule times the factor at which the squared error is as wanted)."""
    low, high = -60.0, 60.0
    for _ in range(80):
        middle = (low + high) / 2
        pi = np.clip(rule * np.exp(middle), 1e-300, 1)
        if float((square * (1 / pi - 1)).sum()) > wanted:
            low = middle
        else:
            high = middle
    return np.clip(rule * np.exp(high), 1e-300, 1)


def print_rules(hidden: Hidden, weight_VD: Tensor) -> None:
    """Print each rule's cost over that of pi = p / tau, at its squared error."""
    sums = _sums(hidden, weight_VD)
    p_B = np.exp(LOWEST + BIN * (np.arange(_BINS) + 0.5))
    plain_B11 = np.minimum(1, p_B / TAU)[:, None]
    count_BC, square_BC = sums.count_NBC.sum(0), sums.square_NBC.sum(0)
    wanted = float((square_BC * (1 / plain_B11 - 1)).sum())
    entries_C = (count_BC * plain_B11).sum(0) / len(sums.tail_N)
    tokens_C = np.diff([0, *_RANKS, len(weight_VD)])
    bits_C = np.log2(tokens_C / entries_C) + 1.44 + _VALUE_BITS
    print(f"{len(sums.tail_N)} tokens; bits of an entry by class {np.round(bits_C, 1)}")

    def line(name: str, count: Reals, square: Reals, rule: Reals, cost: Reals) -> None:
        pi = _at_the_error(square, rule, wanted)
        before = float((count_BC * plain_B11 * cost.reshape(-1)).sum())
        print(f"{name:<56} {float((count * pi * cost).sum()) / before:7.3f}")

    one = np.ones(1)
    for power in (0.9, 0.8, 0.7):
        rule = plain_B11**power
        line(f"p^{power}, entries", count_BC, square_BC, rule, one)
        line(f"p^{power}, bits", count_BC, square_BC, rule, bits_C)

    def best(name: str, groups_N: NDArray[np.int64], cost_C: Reals, *, by_class: bool) -> None:
        groups = int(groups_N.max()) + 1
        count = np.stack([sums.count_NBC[groups_N == g].sum(0) for g in range(groups)])
        square = np.stack([sums.square_NBC[groups_N == g].sum(0) for g in range(groups)])
        mean = square / np.maximum(count, 1e-9)
        if not by_class:
            of = square.sum(2, keepdims=True) / np.maximum(count.sum(2, keepdims=True), 1e-9)
            mean = np.broadcast_to(of, mean.shape)
        line(name, count, square, np.sqrt(mean / cost_C), cost_C)

    alike_N = np.zeros(len(sums.tail_N), np.int64)
    edges = np.quantile(sums.tail_N, np.linspace(0, 1, 7)[1:-1])
    by_tail_N = np.searchsorted(edges, sums.tail_N)
    best("best of p, entries", alike_N, one, by_class=False)
    best("best of p and the tail's mass in six groups, entries", by_tail_N, one, by_class=False)
    best("best of p and class, entries", alike_N, one, by_class=True)
    best("best of p and class, bits", alike_N, bits_C, by_class=True)
    best("best of p, class and the tail's mass, bits", by_tail_N, bits_C, by_class=True)
