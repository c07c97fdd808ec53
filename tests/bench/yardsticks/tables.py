"""The tables and figures of the yardsticks, from the scores that runs left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.bench.yardsticks.arms import ARMS, CE, DENSE, NEAR, SAMPLED, SPARSE
from tests.bench.yardsticks.gradients import Compared
from tests.bench.yardsticks.measures import (
    Array,
    Estimate,
    calibration_error,
    estimate,
    gap_closed,
    mean_and_error,
)
from tests.bench.yardsticks.papers import OTHERS, RS_KD, Reported

__all__ = ["Scores", "print_copying", "print_figures", "print_gradients", "print_students"]

Scores = Mapping[str, Mapping[str, Array]]
"""By arm and measure: [S, R], bins [S, R, B, 3]."""
_SHORT = {
    "top-12 truncated": "top12", "top-50 truncated": "top50", "top-64 + bucket": "bucket",
    "12 draws": "draws12", "50 draws": "draws50", "256 draws renormalised": "gemma",
    SAMPLED: "sampled",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Gap:
    by_loss: Estimate
    by_kl: Estimate


def mean(row_R: Array) -> float:
    """Return the mean over rows."""
    return float(row_R.mean())


def difference(row_R: Array, other_R: Array) -> float:
    """Return the mean difference, paired by rows."""
    return float((row_R - other_R).mean())


def _share(worst_R: Array, found_R: Array, best_R: Array) -> float:
    return gap_closed(mean(worst_R), mean(found_R), mean(best_R))


def _gap(scores: Scores, name: str) -> _Gap:
    worst, best = (f"{_prefix(name)}{arm}" for arm in (CE, DENSE))
    parts = [
        estimate(_share, *(scores[arm][key] for arm in (worst, name, best)))
        for key in ("loss", "kl")
    ]
    return _Gap(*parts)


def _prefix(name: str) -> str:
    return NEAR if name.startswith(NEAR) else ""


def print_gradients(
    compared: Mapping[str, Mapping[str, Compared]], entries: Mapping[str, float], tokens: int
) -> None:
    """Print angles and norms; `compared` is by state of the student and by target."""
    print(
        f"\n1a. gradient of the body's weights against the dense one; steps of some {tokens} tokens"
    )
    print(f"{'student':<18} {'target':<24} {'ids':>6} {'angle, a step':>16} {'norm ratio':>16} "
          f"{'all: angle':>10} {'ratio':>6}   paper: angle, ratio")  # fmt: skip
    for state, rows in compared.items():
        for name, row in rows.items():
            angle, angle_error = mean_and_error(row.angles)
            ratio, ratio_error = mean_and_error(row.ratios)
            paper = RS_KD.get(name, Reported())
            said = _said(paper.angle, "{:.0f}"), _said(paper.ratio, "{:.1f}")
            print(f"{state:<18} {name:<24} {entries.get(name, np.nan):6.1f} "
                  f"{angle:8.2f} +- {angle_error:4.2f} {ratio:8.3f} +- {ratio_error:5.3f} "
                  f"{row.angle:10.2f} {row.ratio:6.3f}   {said[0]}, {said[1]}")  # fmt: skip


def print_students(scores: Scores, starts: Mapping[str, Mapping[str, Any]]) -> None:
    """Print scores of teachers and starts, then a table a section."""
    print("\nbefore training: held-out loss, KL to the plain teacher, ECE")
    for name, found in starts.items():
        print(f"  {name:<24} {np.mean(found['loss']):8.4f} {np.mean(found['kl']):8.4f} "
              f"{calibration_error(np.array(found['bins'])):7.4f}")  # fmt: skip
    trained = [arm for arm in ARMS if arm.name in scores]
    for section in sorted({arm.section for arm in trained}):
        base = {3: "depth", 5: f"{NEAR}{DENSE}"}.get(section, DENSE)
        names = [arm.name for arm in trained if arm.section == section]
        names = names if base in names or base not in scores else [base, *names]
        print(f"\n{section}. students: held-out loss and KL (T = 1, dense); differences to {base}, "
              "+- by rows, by seeds")  # fmt: skip
        for name in names:
            of = scores[name]
            line = f"  {name:<26} loss {of['loss'].mean():.4f} KL {of['kl'].mean():.4f} ECE "
            ece = estimate(calibration_error, of["bins"])
            line += f"{ece.value:.4f} ({ece.by_rows:.4f}, {ece.by_seeds:.4f})"
            if name != base and base in scores:
                for key in ("loss", "kl"):
                    over = estimate(difference, of[key], scores[base][key])
                    line += f"  {key} {_signed(over)}"
            ends = [f"{_prefix(name)}{end}" for end in (CE, DENSE)]
            if section in (1, 5) and name not in ends and all(end in scores for end in ends):
                gap = _gap(scores, name)
                line += f"  gap by loss {_signed(gap.by_loss)} by KL {_signed(gap.by_kl)}"
            print(f"{line}  | {_paper(name, section)}")


def _paper(name: str, section: int) -> str:
    name = name.removeprefix(NEAR)
    if section not in (1, 5):
        return f"paper: {OTHERS.get(name, '')}"
    found = RS_KD.get(name)
    if found is None:
        return "paper: none, this project's"
    said = f"paper: loss {_said(found.loss, '{:.2f}')}, gap {_said(found.gap_closed, '{:.2f}')}"
    return f"{said}, ECE {_said(found.ece, '{:.3f}')} {found.note}".rstrip()


def _said(value: float | None, form: str) -> str:
    return "not found" if value is None else form.format(value)


def _signed(found: Estimate) -> str:
    return f"{found.value:+.4f} ({found.by_rows:.4f}, {found.by_seeds:.4f})"


def print_copying(scores: Scores, starts: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the probe of copying; errors of students by sequences and by seeds."""
    keys = ("random_accuracy", "random_gain", "text_accuracy", "text_gain")
    print("\n6. second copy: accuracy and loss gained (nats), of random tokens and of text; "
          "+- by sequences, by seeds")  # fmt: skip
    before = {name: {key: np.array([found[key]]) for key in keys} for name, found in starts.items()}
    for name, found in {**before, **scores}.items():
        cells = [estimate(mean, found[key]) for key in keys]
        print(f"  {name:<26} " + "  ".join(
            f"{c.value:.3f} ({c.by_rows:.3f}, {c.by_seeds:.3f})" for c in cells
        ))  # fmt: skip


def print_figures(scores: Scores, compared: Mapping[str, Mapping[str, Compared]]) -> None:
    """Print the figures that the documents name, of what was run."""
    for state, of_state in (("", "start"), ("near_", "near")):
        for name, row in compared.get(of_state, {}).items():
            if name in _SHORT:
                print(f"FIGURE yardsticks_angle_{state}{_SHORT[name]} {row.angle:.2f}")
    for prefix, words in (("", ""), (NEAR, "near_")):
        for name in SPARSE:
            if all(f"{prefix}{arm}" in scores for arm in (CE, name, DENSE)):
                gap = _gap(scores, f"{prefix}{name}").by_kl.value
                print(f"FIGURE yardsticks_gap_closed_{words}{_SHORT[name]} {gap:.3f}")
    pairs = {
        "selected_kl_over_dense": ("20 % by student entropy", DENSE, "kl"),
        "width_loss_over_depth": ("width", "depth", "loss"),
        "adapted_loss_over_plain": ("depth, adapted teacher", "depth", "loss"),
        "reverse_kl_over_forward": ("reverse KL", DENSE, "kl"),
        "copy_gain_dense_over_cross_entropy": (DENSE, CE, "text_gain"),
    }
    for figure, (name, base, key) in pairs.items():
        if name in scores and base in scores:
            print(f"FIGURE yardsticks_{figure} "
                  f"{difference(scores[name][key], scores[base][key]):.4f}")  # fmt: skip
