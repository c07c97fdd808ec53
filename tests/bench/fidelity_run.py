"""The arithmetic of the fidelity bench: every scheme's weight gradient against the dense one.

The error is that of the gradient on the head's WEIGHT after summing over all tokens, relative to
the dense KL's, as an optimiser step sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.data.collate import Batch
from pipeline.loss.chunk_gradient import LossSpec, sparse_loss_
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.quantisation import SAMPLED_QUANTISATION
from pipeline.teacher.sparsify.device import SparseScheme
from pipeline.teacher.sparsify.scheme import OVERSAMPLING
from tests.bench.fidelity_cache import Cached, head_targets, through_the_cache
from tests.bench.fidelity_data import Hidden
from tests.bench.peers.seam import Peer, Stored, rows_of

__all__ = [
    "BUCKET", "DRAWS", "GRID", "SCHEMES", "T2_SCHEME", "Caches", "Errors", "Table", "at",
    "bytes_at", "run", "sampled",
]  # fmt: skip

CHUNK = 64
"""Rows at a time: 12 MB of logits at V = 49,152, which fit the processor's cache."""
GRID = (1.0, 2.0)
SKETCH = 64
"""Weight gradients are compared along this many of the 576 hidden dimensions, to save time. This
changes the errors by 1 to 2 % of their value."""
DRAWS = 4


def sampled(*taus: float, top_k: int = 1) -> SparseScheme:
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
    bytes_per_token: float | None = 0.0
    """None: nothing is stored."""
    sums: dict[tuple[float, int], Tensor] = field(default_factory=dict)
    """By temperature and sample."""
    at: dict[float, list[float]] = field(default_factory=dict)
    """By temperature: the relative error after each requested number of tokens, root mean
    square over draws."""
    squares: float = 0.0
    """Of the differences of rebuilt log-probs, in nats squared, summed over `rebuilt` of them."""
    rebuilt: int = 0

    @property
    def rmse(self) -> float | None:
        """Root mean square error of the log-probs that come back, in nats."""
        return float(np.sqrt(self.squares / self.rebuilt)) if self.rebuilt else None

    def add(self, temperature: float, error_RV: Tensor, h_RS: Tensor, *, draw: int = 0) -> None:
        """Add the errors of a chunk of tokens: gradients on the logits times hidden states."""
        if (temperature, draw) not in self.sums:
            self.sums[temperature, draw] = error_RV.t() @ h_RS
        else:
            self.sums[temperature, draw].addmm_(error_RV.t(), h_RS)

    def compare(self, stored: Stored, teacher_RV: Tensor) -> None:
        """Add the differences of rebuilt log-probs from the teacher's."""
        there_RK = stored.logprobs_RK > -100  # what a project leaves out has marks for id and value
        ids_RK = torch.where(there_RK, stored.ids_RK.long(), 0)
        exact_RK = torch.log_softmax(teacher_RV, -1).gather(1, ids_RK)
        difference_RK = torch.where(there_RK, stored.logprobs_RK - exact_RK, 0.0)
        self.squares += float(difference_RK.double().square().sum())
        self.rebuilt += int(there_RK.sum())

    def note(self, dense: Errors) -> None:
        """Note the errors so far, relative to the dense gradients."""
        squares: dict[float, list[float]] = {}
        for (temperature, _), error_VS in self.sums.items():
            error = float(error_VS.norm() / dense.sums[temperature, 0].norm())
            squares.setdefault(temperature, []).append(error**2)
        for temperature, found in squares.items():
            self.at.setdefault(temperature, []).append(float(np.sqrt(np.mean(found))))


Table = dict[str, Errors]
Caches = dict[tuple[str, int], Cached]
"""Targets by scheme and draw: they are the same for every student of the same tokens."""


def run(
    hidden: Hidden,
    schemes: dict[str, SparseScheme],
    temperatures: tuple[float, ...],
    *,
    marks: tuple[int, ...] = (),
    peers: list[Peer] | None = None,
    draws: int = DRAWS,
    caches: Caches | None = None,
    noted: Callable[[Table, int], None] = lambda table, tokens: None,
) -> Table:
    """Return entries, bytes and relative errors of every scheme.

    Args:
        hidden: the tokens.
        schemes: by name.
        temperatures: of the student's loss.
        marks: numbers of tokens after which errors are noted; after all of them in any case.
        peers: other projects' targets and losses, on the same rows.
        draws: samples of a scheme with sampled entries; a single one is off by about 5 %.
        caches: the targets that another student of these tokens had, and room for those made here.
        noted: called after each mark.
    """
    weight_VD = torch.from_numpy(hidden.weight_VD)
    tokens, width = len(hidden.label_N), weight_VD.shape[1]
    generator = torch.Generator().manual_seed(0)
    sketch_DS = torch.linalg.qr(torch.randn(width, SKETCH, generator=generator)).Q
    caches = {} if caches is None else caches
    batches: dict[tuple[str, float], list[Batch]] = {}
    table: Table = {}
    for name, scheme in schemes.items():
        for draw in range(draws if scheme.rule else 1):
            cached = caches.get((name, draw))
            if cached is None:
                cached = through_the_cache(hidden.redrawn(draw), weight_VD, scheme)
                caches[name, draw] = cached
            table.setdefault(name, Errors(cached.entries, cached.bytes_per_token))
            for temperature in temperatures:
                if temperature in scheme.temperatures:
                    batch = cached.batch(temperature)
                    batches.setdefault((name, temperature), []).append(batch)
    dense, peers = Errors(), peers or []
    table |= {name: Errors(peer.kept, None) for name, (peer, _) in rows_of(peers).items()}
    ends = sorted({*marks, tokens})
    for start in range(0, tokens, CHUNK):
        rows = slice(start, min(start + CHUNK, tokens))
        teacher_RV = torch.from_numpy(hidden.teacher_ND[rows]).float() @ weight_VD.t()
        h_RD = torch.from_numpy(hidden.student_ND[rows]).float()
        student_RV, h_RS = h_RD @ weight_VD.t(), h_RD @ sketch_DS
        exact = {
            t: torch.softmax(student_RV / t, -1) - torch.softmax(teacher_RV / t, -1)
            for t in temperatures
        }
        for temperature, exact_RV in exact.items():
            dense.add(temperature, exact_RV, h_RS)
            for name in schemes:
                for draw, batch in enumerate(batches.get((name, temperature), ())):
                    gradient_RV = _gradient(student_RV, batch, rows, temperature, schemes[name])
                    table[name].add(temperature, gradient_RV.sub_(exact_RV), h_RS, draw=draw)
        for peer in peers:
            _add_peer(peer, table, teacher_RV, student_RV, exact, h_RS)
        while ends and rows.stop >= ends[0]:
            ends.pop(0)
            for result in table.values():
                result.note(dense)
            if marks:
                noted(table, rows.stop)
    for peer in peers:
        size = peer.stored_bytes()
        for name in rows_of([peer]):
            table[name].bytes_per_token = None if size is None else size / tokens
    return table


def _add_peer(
    peer: Peer, table: Table, teacher_RV: Tensor, student_RV: Tensor,
    exact: dict[float, Tensor], h_RS: Tensor,
) -> None:  # fmt: skip
    stored = peer.store(teacher_RV)
    for name, (_, loss) in rows_of([peer]).items():
        if peer.rebuilds:
            table[name].compare(stored, teacher_RV)
        for temperature, exact_RV in exact.items():
            if temperature in loss.temperatures:
                gradient_RV = loss.gradient(stored, student_RV, temperature)
                table[name].add(temperature, gradient_RV - exact_RV, h_RS)


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


def at(tokens: int, counts: tuple[int, ...], errors: list[float]) -> float:
    """Return the error after `tokens`: as measured, else by error^2 = noise / tokens + bias^2."""
    if tokens in counts:
        return errors[counts.index(tokens)]
    # The uncertainty of each point is proportional to it, so relative errors are fitted.
    design_MP = np.stack([1 / np.array(counts), np.ones(len(counts))], axis=1)
    squares_M = np.square(errors)
    noise, bias = np.linalg.lstsq(design_MP / squares_M[:, None], np.ones(len(counts)))[0]
    return float(np.sqrt(max(noise, 0) / tokens + max(bias, 0)))


def bytes_at(table: Table, error: float) -> float:
    """Return the bytes at which the rules of T = 1 alone reach `error`.

    On a line in logarithms between the two nearest points; beyond the first or the last of them,
    on the line through the two at that end.
    """
    points = sorted(
        (float(np.log(row.at[1.0][-1])), float(np.log(row.bytes_per_token)))
        for name, row in table.items()
        if name.startswith("threshold") and 2.0 not in row.at and row.bytes_per_token
    )
    wanted = float(np.log(error))
    last = len(points) - 1
    right = min(max(sum(point[0] < wanted for point in points), 1), last)
    (x_0, y_0), (x_1, y_1) = points[right - 1], points[right]
    return float(np.exp(y_0 + (wanted - x_0) * (y_1 - y_0) / (x_1 - x_0)))
