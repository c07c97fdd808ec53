"""Other projects' targets rebuilt here in plain torch: rows without a checkout, and each says so.

None of their code runs and their codecs are left out: the kept log-probs are exact, so that these
rows show what a way to treat the rest costs at the least. `--peer` replaces them by their code.
Legend: R rows, V vocabulary, K kept entries; p and q are teacher and student at temperature T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.bench.peers.seam import Loss, Peer, Stored, top_k

__all__ = ["drawn_renormalised", "random_sampling", "rebuilt", "truncated"]

_Gradient = Callable[[Stored, Tensor, float], Tensor]
"""From the stored entries, q [R, V] and T."""


def _renormalised(stored: Stored, temperature: float) -> Tensor:
    return torch.softmax(stored.logprobs_RK / temperature, -1)


def zero(stored: Stored, q_RV: Tensor, temperature: float) -> Tensor:
    """Teacher renormalised over the kept, student full: DistillKit's `zero`, Axolotl."""
    return q_RV.scatter_add(1, stored.ids_RK, -_renormalised(stored, temperature))


def unnormalised(stored: Stored, q_RV: Tensor, temperature: float) -> Tensor:
    """Kept entries as they are, nothing for the rest: verl. At T != 1 p is scaled by its own Z."""
    log_z_R1 = stored.more["log_z_R1"][temperature]
    p_RK = (stored.logprobs_RK / temperature - log_z_R1).exp()
    return (p_RK.sum(-1, keepdim=True) * q_RV).scatter_add(1, stored.ids_RK, -p_RK)


def renormalised_both(stored: Stored, q_RV: Tensor, temperature: float) -> Tensor:
    """Both renormalised over the kept: ms-swift, MaxText, NeMo-Aligner."""
    q_RK = q_RV.gather(1, stored.ids_RK)
    difference_RK = q_RK / q_RK.sum(-1, keepdim=True) - _renormalised(stored, temperature)
    return torch.zeros_like(q_RV).scatter_(1, stored.ids_RK, difference_RK)


def drawn(stored: Stored, q_RV: Tensor, temperature: float) -> Tensor:
    """Draws from p with replacement (random-sampling KD), re-tempered where T != 1."""
    weight_RK = torch.full(stored.ids_RK.shape, 1 / stored.ids_RK.shape[1])
    if temperature != 1.0:  # p^(1/T) / p times the estimate of p, renormalised
        weight_RK = (stored.logprobs_RK * (1 / temperature - 1)).exp()
        weight_RK = weight_RK / weight_RK.sum(-1, keepdim=True)
    return q_RV.scatter_add(1, stored.ids_RK, -weight_RK)


def kept_of_drawn(stored: Stored, q_RV: Tensor, temperature: float) -> Tensor:
    """Teacher's own probabilities of the different ids drawn, scaled to sum to 1: Gemma 3."""
    p_RV = torch.zeros_like(q_RV)
    p_RV.scatter_(1, stored.ids_RK, (stored.logprobs_RK / temperature).exp())
    return q_RV - p_RV / p_RV.sum(-1, keepdim=True)


@dataclass
class _Rebuilt:
    name: str
    options: str
    kept: float
    rule: _Gradient
    bytes_per_row: float | None
    """Of the documented layout."""
    draws: int = 0
    seed: int = 0
    """Of the draws."""
    rebuilds: bool = False
    losses: Mapping[str, Loss] = field(init=False)
    _rows: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Make the loss of the rule."""

        def gradient(stored: Stored, student_RV: Tensor, temperature: float) -> Tensor:
            return self.rule(stored, torch.softmax(student_RV / temperature, -1), temperature)

        self.losses = {"": Loss(gradient)}

    def store(self, teacher_RV: Tensor) -> Stored:
        """Return exact log-probs of the top k, or of the draws."""
        at, self._rows = self._rows, self._rows + len(teacher_RV)
        log_z_R1 = {
            temperature: torch.logsumexp(
                torch.log_softmax(teacher_RV, -1) / temperature, -1, keepdim=True
            )
            for temperature in ((1.0, 2.0) if self.rule is unnormalised else ())
        }
        if not self.draws:
            return Stored(*top_k(teacher_RV, int(self.kept)), {"log_z_R1": log_z_R1})
        # torch takes the lowest 32 bits alone.
        generator = torch.Generator().manual_seed(self.seed * 100_003_007 + at)
        log_p_RV = torch.log_softmax(teacher_RV, -1)
        ids_RK = torch.multinomial(
            log_p_RV.exp(), self.draws, replacement=True, generator=generator
        )
        return Stored(ids_RK, log_p_RV.gather(1, ids_RK))

    def stored_bytes(self) -> int | None:
        """The documented layout's bytes of all rows so far."""
        return None if self.bytes_per_row is None else round(self._rows * self.bytes_per_row)


def truncated(k: int) -> Peer:
    """Return the top k scaled to sum to 1: no project's, what several have in common."""
    return _Rebuilt(f"top-{k} truncated", f"exact log-probs, k {k}, renormalised", k, zero, None)


def random_sampling(draws: int, *, seed: int = 0) -> Peer:
    """Return random-sampling KD: ids drawn with replacement, their frequencies as the target."""
    return _Rebuilt(
        f"random-sampling KD, {draws} draws, rebuilt", "frequencies of the draws",
        draws, drawn, None, draws=draws, seed=seed,
    )  # fmt: skip


def drawn_renormalised(draws: int, *, seed: int = 0) -> Peer:
    """Return Gemma 3's targets: drawn ids with the teacher's probabilities, scaled to sum to 1."""
    return _Rebuilt(
        f"{draws} draws renormalised, rebuilt", "as Gemma 3's report says it",
        draws, kept_of_drawn, None, draws=draws, seed=seed,
    )  # fmt: skip


def rebuilt(without: Iterable[str] = ()) -> list[Peer]:
    """Return the rows of all projects but those `without`, which run by their own code."""
    rows: dict[str, list[Peer]] = {
        "distillkit": [
            _Rebuilt("DistillKit recommended, zero, rebuilt", "k 128, exact", 128, zero, 312),
            _Rebuilt("DistillKit budget, zero, rebuilt", "k 50, exact", 50, zero, 114),
        ],
        "axolotl": [
            _Rebuilt("Axolotl, k = 64, rebuilt", "lists of 64 bits", 64, zero, 1024),
        ],
        "verl": [
            _Rebuilt("verl, k = 64, rebuilt", "no clamps; nothing stored", 64, unnormalised, None),
        ],
        "ms-swift": [
            _Rebuilt(
                "ms-swift, k = 64, rebuilt", "beta 0; nothing stored", 64, renormalised_both, None
            ),
        ],
        "": [
            _Rebuilt(
                "random-sampling KD, 50 draws, rebuilt", "3 bytes for each of 17 different ids",
                17, drawn, 50, draws=50,
            ),
        ],
    }  # fmt: skip
    left_out = set(without)
    return [peer for key, peers in rows.items() if key not in left_out for peer in peers]
