"""The loss by its definition: dense, float64, one row at a time; a reference for tests.

Shapes: N supervised tokens, K entries of the fullest one, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.loss.sampled_divergence import dither_bias, row_share
from pipeline.loss.settings import Divergence
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets

__all__ = [
    "cross_entropy",
    "dense_divergence",
    "dense_kl",
    "loss_sum",
    "outcome",
    "sorted_distance",
    "sparse_divergence",
]


def dense_kl(logits_NV: Tensor, teacher_logprobs_NV: Tensor, *, temperature: float) -> Tensor:
    """Return KL(p_T || q_T) of each token, in nats, over the whole vocabulary."""
    return dense_divergence(logits_NV, teacher_logprobs_NV, LossSpec(temperature, 1.0))


def dense_divergence(logits_NV: Tensor, teacher_logprobs_NV: Tensor, spec: LossSpec) -> Tensor:
    """Return D(p_T, q_T) of each token, in nats, over the whole vocabulary."""
    p_NV = torch.softmax(teacher_logprobs_NV.double() / spec.temperature, dim=-1)
    q_NV = torch.softmax(logits_NV.double() / spec.temperature, dim=-1)
    return outcome(spec, p_NV, q_NV).sum(-1)


def cross_entropy(logits_NV: Tensor, label_N: Tensor) -> Tensor:
    """Return -log q(label) of each token at temperature 1, in nats."""
    return torch.nn.functional.cross_entropy(logits_NV.double(), label_N, reduction="none")


def sparse_divergence(logits_NV: Tensor, targets: HeadTargets, spec: LossSpec) -> Tensor:
    """Return D of each token from sparse targets, in nats, under the spec's tail policy.

    Its derivative is the gradient that `sparse_loss_` (`uld_loss_`) applies.
    """
    if spec.cross_tokenizer == "uld":
        return _sorted_distance_of_head(logits_NV, targets)
    if spec.divergence == "sampled_reverse_kl":
        return _policy_gradient(logits_NV, targets, spec)
    values = [_row(logits_NV[n].double(), targets, n, spec) for n in range(len(logits_NV))]
    return torch.stack(values) if values else logits_NV.new_zeros(0, dtype=torch.float64)


def sorted_distance(logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Return ULD of each token as its paper defines it: sum over ranks of |q_(r) - p_(r)|.

    The teacher's probabilities may be over another vocabulary; the shorter side gets zeros.
    """
    q_NV = torch.softmax(logits_NV.double(), dim=-1).sort(-1, descending=True).values
    p_NV = teacher_NV.double().sort(-1, descending=True).values
    width = max(q_NV.shape[1], p_NV.shape[1])
    q_NV = torch.nn.functional.pad(q_NV, (0, width - q_NV.shape[1]))
    p_NV = torch.nn.functional.pad(p_NV, (0, width - p_NV.shape[1]))
    return (q_NV - p_NV).abs().sum(-1)


def _sorted_distance_of_head(logits_NV: Tensor, targets: HeadTargets) -> Tensor:
    """ULD where only the teacher's first ranks are known, and the rest is one outcome."""
    values = []
    for n in range(len(logits_NV)):
        q_V = torch.softmax(logits_NV[n].double(), dim=-1).sort(descending=True).values
        known = torch.isfinite(targets.logprobs_NK[n])
        p_K = targets.logprobs_NK[n][known].double().exp().sort(descending=True).values[: len(q_V)]
        if not len(p_K):
            values.append(0.0 * q_V.sum())
            continue
        p_K = p_K / p_K.sum().clamp(min=1.0)
        value = (q_V[: len(p_K)] - p_K).abs().sum()
        if len(p_K) < len(q_V):
            value = value + (q_V[len(p_K) :].sum() - (1 - p_K.sum())).abs()
        values.append(value)
    return torch.stack(values) if values else logits_NV.new_zeros(0, dtype=torch.float64)


def _policy_gradient(logits_NV: Tensor, targets: HeadTargets, spec: LossSpec) -> Tensor:
    """The weight c of each token, with the derivative of -A log q(y), c = -A held constant."""
    values = []
    for n, label in enumerate(targets.label_N.tolist()):
        log_q = torch.log_softmax(logits_NV[n].double(), dim=-1)[label]
        assert targets.label_logprob_N is not None
        c = log_q.detach() - targets.label_logprob_N[n].double()
        if spec.importance_clip is not None:
            assert targets.written_logprob_N is not None
            ratio = float((log_q.detach() - targets.written_logprob_N[n].double()).exp())
            c = c * min(ratio, spec.importance_clip)
        values.append(c + c * (log_q - log_q.detach()))
    return torch.stack(values) if values else logits_NV.new_zeros(0, dtype=torch.float64)


def loss_sum(logits_NV: Tensor, targets: HeadTargets, spec: LossSpec) -> Tensor:
    """Return `alpha * T^2 * sum(D) + (1 - alpha) * sum(CE)`, of tokens times their weights."""
    divergence_N = sparse_divergence(logits_NV, targets, spec)
    ce_N = cross_entropy(logits_NV, targets.label_N)
    if targets.weight_N is not None:
        divergence_N, ce_N = divergence_N * targets.weight_N, ce_N * targets.weight_N
    return spec.alpha * spec.temperature**2 * divergence_N.sum() + (1 - spec.alpha) * ce_N.sum()


def outcome(spec: LossSpec, p: Tensor, q: Tensor) -> Tensor:
    """Return f(p, q) of outcomes, in the divergence's textbook form."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.xlogy(a, a) - torch.xlogy(a, b)

    beta, alpha = spec.jsd_beta, spec.skew_alpha
    name: Divergence = spec.divergence
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jensen_shannon":
        mixture = beta * p + (1 - beta) * q
        return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
    if name == "skew_kl":
        return kl(p, alpha * p + (1 - alpha) * q)
    return kl(q, (1 - alpha) * p + alpha * q)


def _row(logits_V: Tensor, targets: HeadTargets, n: int, spec: LossSpec) -> Tensor:
    sampled = targets.inclusion_NK is not None
    tail = spec.tail_for(sampled=sampled)
    entries: list[tuple[int, Tensor, float]] = []
    for k in range(targets.ids_NK.shape[1]):
        logprob = targets.logprobs_NK[n, k].double()
        if torch.isfinite(logprob):
            p = (logprob / spec.temperature - targets.log_z_N[n].double()).exp()
            pi = 1.0 if targets.inclusion_NK is None else float(targets.inclusion_NK[n, k])
            entries.append((int(targets.ids_NK[n, k]), p, pi))
    q_V = torch.softmax(logits_V / spec.temperature, dim=-1)
    if targets.top_k_N is not None and targets.top_k_N[n] and tail == "control_variate":
        sampled, tail = False, "bucket"
    if sampled and tail in ("control_variate", "zero"):
        return _estimate(q_V, entries, 0.0 if tail == "zero" else spec.control_variate, spec)

    kept = [e for e in entries if e[0] < len(q_V) and not (tail == "bucket" and e[2] < 1)]
    if not kept:
        return _without_entries(q_V, tail, spec)
    ids = [token for token, _, _ in kept]
    weight_K = torch.stack([p / pi for _, p, pi in kept])
    total = weight_K.sum()
    all_kept = len(ids) == len(q_V)
    rest = torch.zeros(())
    if tail == "renormalise" or (tail == "bucket" and (total > 1 or all_kept)):
        weight_K = weight_K / total
    elif tail == "bucket":
        rest = 1 - total
    if spec.divergence == "reverse_kl":
        rest = rest.clamp(min=2.0**-20)
    outside = torch.ones(len(q_V), dtype=torch.bool)
    outside[ids] = False
    value = outcome(spec, weight_K, q_V[ids]).sum()
    return value if all_kept else value + outcome(spec, rest, q_V[outside].sum())


def _without_entries(q_V: Tensor, tail: str, spec: LossSpec) -> Tensor:
    """No entry is known: under `bucket` one outcome of mass 1, else no teacher mass at all."""
    one = q_V.sum()
    p = torch.ones_like(one) if tail == "bucket" else torch.zeros_like(one)
    return outcome(spec, p, one)


def _estimate(
    q_V: Tensor, entries: list[tuple[int, Tensor, float]], share: float | None, spec: LossSpec
) -> Tensor:
    """Return the always-kept terms and the estimate of the tail's; see `sampled_divergence`."""
    always_kept = [(token, p) for token, p, pi in entries if pi >= 1]
    sampled = [(token, p, pi) for token, p, pi in entries if pi < 1]
    inside = [token for token, _ in always_kept if token < len(q_V)]
    in_tail = torch.ones(len(q_V), dtype=torch.bool)
    in_tail[inside] = False
    tail_q = q_V[in_tail].sum()
    tail_p = max(0.0, 1 - sum(float(p) for _, p in always_kept))
    tau, upsilon = 0.0, 0.0
    if share is None and tail_p > 0:
        apart = torch.as_tensor(tail_p).log() * tail_p - tail_p * tail_q.detach().log()
        squares, mass = torch.zeros_like(tail_q), torch.zeros_like(tail_q)
        for token, p in always_kept:
            if token < len(q_V):
                ratio = p.log() - q_V[token].detach().log()
                apart = apart + p * ratio
                squares, mass = squares + p * ratio**2, mass + p
        spread = squares / mass if mass > 0 else mass
        share = float(row_share(apart, spread, spec.temperature, spec.rule_highest))
    if share is not None and tail_p > 0 and len(inside) < len(q_V):
        ratio = torch.tensor(
            tail_p / float(tail_q.detach()), dtype=torch.float64, requires_grad=True
        )
        one = torch.ones((), dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            gradients = torch.autograd.grad(outcome(spec, ratio, one), (ratio, one))
        tau, upsilon = (share * float(g) for g in gradients)
    else:
        share = 0.0
    nothing = torch.zeros((), dtype=torch.float64)
    upsilon += (1 - share) * float(outcome(spec, nothing, nothing + 1))
    value = tau * tail_p + upsilon * tail_q
    for token, p in always_kept:
        if token < len(q_V):
            value = value + outcome(spec, p, q_V[token])
    log_bias, value_bias = dither_bias(spec.sampled_log_step, spec.temperature)
    for token, rounded_p, pi in sampled:
        p = rounded_p * math.exp(-log_bias)
        value = value - tau * p / pi
        if token < len(q_V):
            value = value + (outcome(spec, p, q_V[token]) - upsilon * q_V[token]) / pi
            if spec.divergence == "forward_kl":
                value = value - value_bias * p / pi
    return value
