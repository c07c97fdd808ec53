"""Packed against alone in tiny models of many families, each run as a student would be.

    python -m tests.bench.families [--families Llama,LFM2]

`make check-families`. For each family of `tests/tiny_families.py` (random weights, float32, the
attention that `auto` takes on a CPU) the packing trial that precedes every training, and then the
way it chose: hidden states and gradients of a micro-batch against those of its sequences in
micro-batches of their own. The way is `boundaries` or `positions` where the trial accepts a packed
row, and `alone` where it warns that it does not. Errors are the largest over the tokens,
|packed - alone| / |alone| of the hidden states (`packed`: of the best packed way, accepted or not;
`error`: of the way chosen, on other sequences), and over the parameters for gradients.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.student.forward.attention import fit_attention, settle_attention
from pipeline.student.forward.body import text_body
from pipeline.student.forward.choice import choose_way
from pipeline.student.forward.trial import relative_errors, run_packing_trial, trial_row
from pipeline.student.forward.ways import BodyForward
from tests.tiny_families import FAMILIES, family_model

LENGTHS = (9, 17, 3)
LIMIT = 1e-4


@dataclass(frozen=True, slots=True)
class Checked:
    """A family's outcome."""

    way: str
    attention: str
    packed: float
    """Relative error of its best packed way, accepted or not."""
    hidden: float
    """Relative error of the way chosen, on sequences that the trial did not use."""
    gradient: float
    said: str
    """The warning, where it falls back."""


def main() -> int:
    """Check, print; 1 where an accepted way is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES))
    names = parser.parse_args().families.split(",")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(
        f"{'family':<20} {'attention':<9} {'way':<10} {'packed':>8} {'error':>8} {'gradient':>8}"
        "  seconds"
    )
    results = {}
    for name in names:
        started = time.monotonic()
        results[name] = result = check(name)
        print(
            f"{name:<20} {result.attention:<9} {result.way:<10} {result.packed:>8.1e} "
            f"{result.hidden:>8.1e} {result.gradient:>8.1e}  {time.monotonic() - started:.1f}",
            flush=True,
        )
    packed = [result for result in results.values() if result.way != "alone"]
    alone = {name: result for name, result in results.items() if result.way == "alone"}
    print(f"\n{len(packed)} families packed, {len(alone)} one sequence at a time:")
    for name, result in alone.items():
        reason, _, cost = result.said.partition(". Short sequences")
        packages = cost.partition("Packed would need ")[2]
        print(
            f"- {name}: {reason.partition('because ')[2]}"
            + (f"; without {packages}" if packages else "")
        )
    worst = max((result.hidden for result in packed), default=0.0)
    every = max(max(result.hidden, result.gradient) for result in results.values())
    print(f"FIGURE families_checked {len(results)}")
    print(f"FIGURE packed_alone_worst {worst:.2e}")
    print(f"FIGURE way_chosen_worst_with_gradients {every:.2e}")
    print(f"FIGURE families_refused_in_words {len(alone)}")
    unsaid = [name for name, result in alone.items() if not result.said]
    return int(worst > LIMIT or bool(unsaid))


def check(name: str) -> Checked:
    """Settle attention and way as a run does, and compare what they compute."""
    try:
        model = family_model(name, attention="sdpa")
        order: tuple[str, ...] = ("sdpa", "eager")
    except ValueError:
        model, order = family_model(name, attention="eager"), ("eager",)
    fit_attention(model, order)
    forward = BodyForward(text_body(model))
    attention = settle_attention(model, forward, order, device="cpu", gather=lambda own: [own])
    packed = run_packing_trial(forward, model, device="cpu").best
    with _Warnings() as said:
        choose_way(
            forward, model, wanted="auto", before=None, device="cpu", gather=lambda own: [own]
        )
    ids_1T, positions_1T = trial_row(model, LENGTHS, "cpu", salt=3)
    together_TD = forward(ids_1T, positions_1T, LENGTHS).hidden_TD
    ours = _gradients(model, together_TD)
    parts = [
        forward(ids_1L, positions_1L, (ids_1L.shape[1],)).hidden_TD
        for ids_1L, positions_1L in zip(
            torch.split(ids_1T, LENGTHS, 1), torch.split(positions_1T, LENGTHS, 1), strict=True
        )
    ]
    apart_TD = torch.cat(parts)
    theirs = _gradients(model, apart_TD)
    scale = max(float(gradient.norm()) for gradient in theirs.values())
    gradient = max(
        float((ours[key] - theirs[key]).norm()) / max(float(theirs[key].norm()), 1e-3 * scale)
        for key in theirs
    )
    return Checked(
        way=forward.way, attention=attention, packed=max(packed.error, packed.seen),
        hidden=float(relative_errors(together_TD.detach(), apart_TD.detach()).max()),
        gradient=gradient, said=" ".join(said.lines),
    )  # fmt: skip


def _gradients(model: Any, hidden_TD: torch.Tensor) -> dict[str, torch.Tensor]:
    weights_TD = torch.linspace(-1, 1, hidden_TD.numel()).reshape(hidden_TD.shape)
    model.zero_grad()
    (hidden_TD * weights_TD).sum().backward()
    return {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }  # fmt: skip


class _Warnings(logging.Handler):
    """Collects the pipeline's warnings while open."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> _Warnings:
        logger = logging.getLogger("pipeline")
        logger.addHandler(self)
        self.before, logger.propagate = logger.propagate, False
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("pipeline")
        logger.removeHandler(self)
        logger.propagate = self.before


if __name__ == "__main__":
    sys.exit(main())
