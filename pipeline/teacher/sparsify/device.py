"""Logits to sparse targets on the device, in rows; the same code behind every engine.

Three schemes behind one type: the k largest entries (top-k); entries sampled by a `InclusionRule`
(threshold); the k largest and a sampled rest (top-k-sampled).

Legend: R rows (positions), V vocabulary, G temperatures, C columns, K always-kept and D sampled
places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cpu_blocks import for_each_block
from pipeline.sampling.inclusion import MOST_INCLUSION, InclusionRule
from pipeline.sampling.quantisation import Quantisation
from pipeline.teacher.sparsify.stopwatch import SPARSIFIER

if TYPE_CHECKING:
    import torch

__all__ = ["SparseScheme", "sparsify"]

_CPU_BLOCK_BYTES = 2 << 20
"""Of float32 rows worked on together on a CPU. A V = 49,152 row takes 348 us in blocks of 8 that
stay in cache, 1,306 us in blocks of 256."""

_LOWEST = 40.0
"""Sampled entries' log p ends here, in nats: what lies below counts as if it were there."""


@dataclass(frozen=True, slots=True)
class SparseScheme:
    """What is kept of a distribution, and the temperatures with an exact normaliser."""

    top_k: int
    """Entries kept with certainty because they are the largest; 0: only the rule decides."""
    temperatures: tuple[float, ...]
    rule: InclusionRule | None = None
    """How the rest is sampled; None: not at all."""
    quantisation: Quantisation = field(default_factory=Quantisation)
    """The rule is evaluated on what is stored, so that readers know the very probability."""
    mean_entries: float | None = None
    """What tau is fitted to (`capture/fit_tau.py`), from `taus_before`; None: not at all."""
    taus_before: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """`top-k`, `threshold` or `top-k-sampled`."""
        if self.rule is None:
            return "top-k"
        return "top-k-sampled" if self.top_k else "threshold"

    def to_json(self) -> dict[str, object]:
        """Return the part of the cache's identity that this scheme makes."""
        data: dict[str, object] = {"name": self.name, "temperatures": list(self.temperatures)}
        if self.top_k:
            data["top_k"] = self.top_k
        if self.rule is not None:
            data["taus"] = list(self.rule.taus)
        if self.mean_entries is not None:
            data["mean_entries"] = self.mean_entries
            data["taus_before"] = list(self.taus_before)
        return data

    @property
    def always_kept_places(self) -> int:
        """K: the k largest and, under an inclusion rule, all whose p is large enough."""
        return max(self.top_k, self.rule.max_always_kept if self.rule else 0)

    @property
    def sampled_places(self) -> int:
        """D: most entries that an inclusion rule can draw at one position."""
        return self.rule.max_sampled(self.quantisation.sampled_step / 2) if self.rule else 0

    @property
    def num_columns(self) -> int:
        """C: label, tail, log Z and entropy per temperature; ids and log-probs of K + D places."""
        return 2 + 2 * len(self.temperatures) + 2 * (self.always_kept_places + self.sampled_places)


def sparsify(
    logits_RV: torch.Tensor,
    label_R: torch.Tensor,
    scheme: SparseScheme,
    noise_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reduce rows of logits to finished columns.

    With p = softmax(z): log Z_T = logsumexp(z/T) - logsumexp(z)/T, which is
    log sum_j p_j^(1/T); the entropy of p_T is logsumexp(z/T) - sum_j p_T,j z_j/T.

    Under an inclusion rule, entries whose exact p asks for it are always kept. Log p of the rest is
    put on its grid with the row's dither, and they are sampled systematically (one offset per row,
    steps of 1 along the running sum of the inclusion probabilities): each is kept with its
    probability, and their number is within one of its mean. The sum runs in integers, so that it
    has no rounding and no order. Were an entry always kept because its ROUNDED p is large, those
    near tau would lose 12 % of their mass: exact where the dither is high, rounded down where it is
    low.

    Args:
        logits_RV: any floating dtype; reduced in float32. Not changed.
        label_R: int64, the token that follows each row.
        scheme: what to keep; its places at most V.
        noise_R: int64 from `counter.row_noise`; needed where the scheme has an inclusion rule.

    Returns:
        float32 [R, C]: label log p; mass outside the always-kept entries; log Z (G); entropy (G);
        ids (K + D, exact in float32 up to 2^24, -1 in an empty place); log p (K + D). The label
        token of a scheme with an inclusion rule is always kept, and not among the entries. NaN
        logits give NaN columns.
    """
    import torch

    rows, vocab = logits_RV.shape
    device = logits_RV.device
    if noise_R is None:
        noise_R = torch.zeros_like(label_R)
    columns_RC = logits_RV.new_empty((rows, scheme.num_columns), dtype=torch.float32)
    if not rows:
        return columns_RC
    # The block's size is fixed, so that no row's bits depend on the number of threads.
    block = max(2, _CPU_BLOCK_BYTES // (4 * vocab)) if device.type == "cpu" else max(rows, 2)

    def open_worker() -> Callable[[int], None]:
        # Written again for each block: new memory of this size costs more than the arithmetic.
        work = _Work(min(block, max(rows, 2)), vocab, device)

        def run(start: int) -> None:
            some = slice(start, start + block)
            columns_RC[some] = _block(logits_RV[some], label_R[some], scheme, noise_R[some], work)

        return run

    with SPARSIFIER.running(device):
        if device.type == "cpu":
            for_each_block(range(0, rows, block), open_worker)
        else:
            open_worker()(0)
    return columns_RC


class _Work:
    """Memory for one block of rows: logits from the largest on, and two arrays of that size."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        import torch

        self.z, self.exp, self.more = (
            torch.empty((rows, vocab), dtype=torch.float32, device=device) for _ in range(3)
        )

    def first(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the three arrays for a block of `rows`."""
        return self.z[:rows], self.exp[:rows], self.more[:rows]


def _block(
    logits_RV: torch.Tensor,
    label_R: torch.Tensor,
    scheme: SparseScheme,
    noise_R: torch.Tensor,
    work: _Work,
) -> torch.Tensor:
    import torch

    if len(logits_RV) == 1:
        # Torch sums a lone row in as many parts as there are threads, and two rows one by one.
        return _block(logits_RV.expand(2, -1), label_R.expand(2), scheme, noise_R.expand(2), work)[
            :1
        ]
    # From the largest on: else sum p z / T loses about (z / T)^2 / 2^24 nats to rounding.
    z_RV, exp_RV, more_RV = work.first(len(logits_RV))
    z_RV.copy_(logits_RV)
    z_RV.sub_(z_RV.amax(-1, keepdim=True))
    statistics = _statistics(z_RV, scheme.temperatures, exp_RV, more_RV)
    log_z_R1, normalisers, entropies = statistics
    label_R1 = z_RV.gather(-1, label_R.unsqueeze(-1)) - log_z_R1
    if scheme.rule is None:
        top_RK, ids_RK = torch.topk(z_RV, scheme.top_k, dim=-1)
        values_RK = top_RK - log_z_R1
        tail_R1 = 1.0 - values_RK.exp().sum(-1, keepdim=True)
        ids = ids_RK.to(torch.float32)
    else:
        # The inclusion rule and its readers see what is stored.
        step = scheme.quantisation.log_z_step
        normalisers = [torch.round(value / step) * step for value in normalisers]
        z_RV.sub_(log_z_R1)
        ids, values_RK, tail_R1 = _draw(
            z_RV, exp_RV, more_RV, label_R.unsqueeze(-1), label_R1, normalisers, scheme,
            noise_R,
        )  # fmt: skip
    return torch.cat(
        [label_R1, tail_R1.clamp(0.0, 1.0), *normalisers, *entropies, ids, values_RK], dim=-1
    )


def _statistics(
    z_RV: torch.Tensor,
    temperatures: tuple[float, ...],
    exp_RV: torch.Tensor,
    more_RV: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Return logsumexp(z), and log Z_T and entropy [R, 1] of each temperature; z is at most 0."""
    import torch

    sums: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(temperature: float) -> None:
        total_R1 = exp_RV.sum(-1, keepdim=True)
        torch.mul(exp_RV, z_RV, out=more_RV)
        sums[temperature] = total_R1, more_RV.sum(-1, keepdim=True)

    for temperature in sorted(temperatures, key=lambda t: (t == 2.0, t == 1.0)):
        if temperature != 1.0:
            torch.mul(z_RV, 1 / temperature, out=exp_RV).exp_()
            take(temperature)
    if 2.0 in temperatures:  # one exponential serves both
        exp_RV.square_()
    else:
        torch.exp(z_RV, out=exp_RV)
    take(1.0)
    log_z_R1 = sums[1.0][0].log()
    normalisers, entropies = [], []
    for temperature in temperatures:
        total_R1, weighted_R1 = sums[temperature]
        lse_R1 = total_R1.log()
        normalisers.append(lse_R1 - log_z_R1 / temperature)
        entropies.append(lse_R1 - weighted_R1 / (total_R1 * temperature))
    return log_z_R1, normalisers, entropies


def _draw(
    log_p_RV: torch.Tensor,
    pi_RV: torch.Tensor,
    more_RV: torch.Tensor,
    label_R1: torch.Tensor,
    label_logprob_R1: torch.Tensor,
    normalisers: list[torch.Tensor],
    scheme: SparseScheme,
    noise_R: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids and log p of K + D places [R, K + D], and the mass outside the always-kept ones.

    `pi_RV` and `more_RV` are memory to write to; `log_p_RV` is put on its grid.
    """
    import torch

    rule, vocab = scheme.rule, log_p_RV.shape[1]
    assert rule is not None
    values_RK, ids_RK = torch.topk(log_p_RV, min(scheme.always_kept_places, vocab), dim=-1)
    # Whole steps of 1/2^bits: sums of all inclusion probabilities fit 31 bits.
    scale = 1 << (30 - (scheme.sampled_places + 1).bit_length())
    most = math.floor(scale * MOST_INCLUSION)
    ratio_RK, more_RK = torch.empty_like(values_RK), torch.empty_like(values_RK)
    _ratio(values_RK, normalisers, rule, ratio_RK, more_RK)
    always_kept_RK = ratio_RK >= 1
    always_kept_RK[:, : scheme.top_k] = True
    always_kept_RK &= ids_RK != label_R1
    dither_R1 = ((noise_R & 0xFFFFFF) * 2.0**-24 - 0.5).to(torch.float32).unsqueeze(-1)
    _on_grid_(log_p_RV, scheme.quantisation.sampled_step, dither_R1)
    _ratio(log_p_RV, normalisers, rule, pi_RV, more_RV)
    pi_RV.mul_(float(scale))
    steps_RV = more_RV.view(torch.int32)
    steps_RV.copy_(pi_RV.add_(0.5).clamp_(max=float(most)))
    steps_RV.scatter_(-1, ids_RK, steps_RV.gather(-1, ids_RK).masked_fill_(always_kept_RK, 0))
    steps_RV.scatter_(-1, label_R1, 0)
    sums_RV = torch.cumsum(steps_RV, -1, dtype=torch.int32, out=pi_RV.view(torch.int32))
    first_R1 = ((noise_R >> 24).unsqueeze(-1) * scale) >> 30
    marks_RD = first_R1 + scale * torch.arange(scheme.sampled_places, device=pi_RV.device)
    sampled_RD = torch.searchsorted(sums_RV, marks_RD.to(torch.int32), right=True)
    empty_RD = sampled_RD >= vocab
    sampled_RD = sampled_RD.masked_fill_(empty_RD, 0)
    mass_R1 = values_RK.exp().masked_fill_(~always_kept_RK, 0.0).sum(-1, keepdim=True)
    tail_R1 = 1.0 - mass_R1 - label_logprob_R1.exp()
    values = torch.cat([values_RK, log_p_RV.gather(-1, sampled_RD)], dim=-1)
    ids = torch.cat(
        [ids_RK.masked_fill(~always_kept_RK, -1), sampled_RD.masked_fill(empty_RD, -1)], dim=-1
    ).to(torch.float32)
    # An empty place carries 0, but a NaN row stays one.
    values = values.masked_fill(ids < 0, 0.0) + label_logprob_R1 * 0.0
    return _padded(ids, scheme, -1.0), _padded(values, scheme, 0.0), tail_R1


def _padded(entries: torch.Tensor, scheme: SparseScheme, value: float) -> torch.Tensor:
    """Fill up to K + D places where the vocabulary is smaller than K."""
    import torch

    missing = scheme.always_kept_places + scheme.sampled_places - entries.shape[1]
    if not missing:
        return entries
    return torch.nn.functional.pad(entries, (missing, 0), value=value)


def _on_grid_(log_p_RV: torch.Tensor, step: float, dither_R1: torch.Tensor) -> None:
    """Round log p to its row's grid of sampled values, in place."""
    log_p_RV.clamp_(min=-_LOWEST).mul_(1 / step).add_(dither_R1).round_()
    log_p_RV.sub_(dither_R1).mul_(step)


def _ratio(
    log_p_RV: torch.Tensor,
    normalisers: list[torch.Tensor],
    rule: InclusionRule,
    pi_RV: torch.Tensor,
    more_RV: torch.Tensor,
) -> None:
    """Write `InclusionRule.ratio` to `pi_RV`.

    Below exp(-40) nothing is sampled; and numbers that are not normal take five times as long.
    """
    import torch

    used = {
        temperature: (tau, log_z)
        for temperature, tau, log_z in zip(rule.temperatures, rule.taus, normalisers, strict=True)
        if tau
    }
    if used.keys() == {1.0, 2.0}:  # with e = p^(1/2): e sqrt((e / tau_1)^2 + 1 / (Z tau_2)^2)
        (tau_1, _), (tau_2, log_z_R1) = used[1.0], used[2.0]
        torch.mul(log_p_RV, 0.5, out=pi_RV).exp_()
        torch.square(pi_RV, out=more_RV)
        more_RV.mul_(1 / tau_1**2).add_(torch.exp(-2 * log_z_R1) / tau_2**2).sqrt_()
        pi_RV.mul_(more_RV)
        return
    for index, (temperature, (tau, log_z_R1)) in enumerate(used.items()):
        target = more_RV if index else pi_RV
        torch.mul(log_p_RV, 1 / temperature, out=target)
        target.sub_(log_z_R1 + float(np.log(tau))).clamp_(min=-40.0).exp_()
        if len(used) > 1:
            target.square_()
        if index:
            pi_RV.add_(more_RV)
    if len(used) > 1:
        pi_RV.sqrt_()
