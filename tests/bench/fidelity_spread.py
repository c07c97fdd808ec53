"""How far the fidelity bench's figures depend on the text and on the student.

Three kinds of text that every installation has (documentation, code, chats) and two students: the
teacher without two layers, near it, and the one that is cut to six layers and reconstructed, from
which `bench-quality` starts, far from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.bench.fidelity_data import CORPORA, Hidden, hidden_states
from tests.bench.fidelity_run import (
    BUCKET,
    SCHEMES,
    T2_SCHEME,
    Caches,
    Table,
    at,
    bytes_at,
    run,
)  # fmt: skip

__all__ = ["Figures", "spread"]

ASKED = 0.04
"""The error at T = 1 whose bytes are asked for, after `SHORT` tokens."""
_TAUS = (8, 16, 28, 64)
_DRAWS = 2


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one text and student."""

    corpus: str
    student: str
    bytes_at_4_percent: float
    t2: tuple[float, float]
    """Errors of the sampled targets and of the top-64 at T = 2, after the tokens measured."""
    t2_ratio: float
    """The first over the second after as many tokens as the figure names."""


def spread(tokens: int, *, short: int, long: int) -> list[Figures]:
    """Measure, print a table, and print the least, mean and most of both figures.

    Args:
        tokens: of each text.
        short: tokens for which the bytes at 4 % are stated; fewer measured ones are scaled, by
            noise that falls as 1 / sqrt(tokens).
        long: tokens for which the ratio at T = 2 is stated, fitted as noise and bias.
    """
    from tests.bench.quality import with_pruned_student

    found = []
    for corpus in CORPORA:
        near = hidden_states(tokens, corpus=corpus).head(tokens)
        caches: Caches = {}
        for student, hidden in (("near", near), ("cut", with_pruned_student(near))):
            found.append(_figures(corpus, student, hidden, tokens, short, long, caches))
            _line(found[-1], tokens, first=len(found) == 1)
    _summary("target_bytes_at_4_percent", [one.bytes_at_4_percent for one in found])
    _summary("t2_error_over_bucket64", [one.t2_ratio for one in found])
    return found


def _figures(
    corpus: str, student: str, hidden: Hidden, tokens: int, short: int, long: int, caches: Caches
) -> Figures:
    names = [f"threshold, tau = 1/{n}" for n in _TAUS]
    ones = {name: SCHEMES[name] for name in names}
    table: Table = run(hidden, ones, (1.0,), draws=_DRAWS, caches=caches)
    twos = {name: SCHEMES[name] for name in (T2_SCHEME, BUCKET)}
    marks = (tokens // 4, tokens // 2)
    at_2 = run(hidden, twos, (2.0,), marks=marks, draws=_DRAWS, caches=caches)
    counts = (*marks, tokens)
    errors = {name: at_2[name].at[2.0] for name in twos}
    ratio = at(long, counts, errors[T2_SCHEME]) / at(long, counts, errors[BUCKET])
    scaled = ASKED * float(np.sqrt(short / tokens))
    return Figures(
        corpus, student, bytes_at(table, scaled), (errors[T2_SCHEME][-1], errors[BUCKET][-1]), ratio
    )


def _line(one: Figures, tokens: int, *, first: bool) -> None:
    if first:
        print(f"spread over texts and students, {tokens} tokens of each text")
        print(f"{'text':<16} {'student':<8} {'bytes at 4 %':>12} "
              f"{'sampled, T = 2':>14} {'top-64, T = 2':>14} {'ratio':>7}")  # fmt: skip
    ours, bucket = (100 * error for error in one.t2)
    print(f"{one.corpus:<16} {one.student:<8} {one.bytes_at_4_percent:12.1f} "
          f"{ours:14.1f} {bucket:14.1f} {one.t2_ratio:7.2f}", flush=True)  # fmt: skip


def _summary(name: str, values: list[float]) -> None:
    print(f"FIGURE {name}_least {min(values):.3f}")
    print(f"FIGURE {name}_mean {np.mean(values):.3f}")
    print(f"FIGURE {name}_most {max(values):.3f}", flush=True)
