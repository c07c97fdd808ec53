"""Time and memory of the loss with the head, over the head's three bare matrix products.

    python -m tests.bench.loss [--tokens 1024] [--rounds 5] [--vocabularies 49152 151936]
        [--only here] [--time_only]

All contenders compute `alpha T^2 D + (1 - alpha) CE` forward and backward from the same hidden
states, on one thread, in turn, `rounds` times; a ratio is the median over rounds of CPU seconds
over those of the same round's matmuls. Memory is what the allocator held at its peak beyond the
inputs and the gradients of hidden states and weight. Across tokenizers D is ULD, at T = 1.
Other projects' losses are rebuilt from their documents and sources in plain torch, and say so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.loss.fused import FusedSpec, fused_head_loss
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from pipeline.sampling.inclusion import InclusionRule

ALPHA, TOP_K, CHUNK = 0.5, 64, 512
HIDDEN = {49_152: 576, 151_936: 896}
"""Hidden sizes of the models with these vocabularies: SmolLM2-135M, Qwen2.5-0.5B."""
RULES = {1.0: InclusionRule((1.0,), (1 / 22,)), 2.0: InclusionRule((1.0, 2.0), (0.0, 1 / 22))}


@dataclass
class Case:
    """One vocabulary's inputs."""

    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_NV: Tensor
    """Dense log p at T = 1, for those that need it; not counted as memory."""
    label_N: Tensor

    def top_k(self, temperature: float) -> HeadTargets:
        """Return the teacher's likeliest tokens."""
        logprobs_NK, ids_NK = self.teacher_NV.topk(TOP_K)
        return HeadTargets(
            ids_NK, logprobs_NK, None, self._log_z(temperature), self._zeros(), self.label_N
        )

    def sampled(self, temperature: float) -> HeadTargets:
        """Return always-kept and sampled entries, about twenty per token."""
        rule, log_p = RULES[temperature], self.teacher_NV.double()
        tau = rule.taus[rule.temperatures.index(temperature)]
        log_z_N1 = torch.logsumexp(log_p / temperature, -1, keepdim=True)
        pi_NV = ((log_p / temperature - log_z_N1).exp() / tau).clamp(max=1)
        generator = torch.Generator().manual_seed(1)
        kept_NV = torch.rand(pi_NV.shape, generator=generator) < pi_NV
        width = int(kept_NV.sum(-1).max())
        there_NK, ids_NK = kept_NV.int().topk(width)
        return HeadTargets(
            ids_NK,
            self.teacher_NV.gather(1, ids_NK).masked_fill(there_NK == 0, -torch.inf),
            pi_NV.gather(1, ids_NK).float().masked_fill(there_NK == 0, 1.0),
            self._log_z(temperature), self._zeros(), self.label_N,
        )  # fmt: skip

    def _log_z(self, temperature: float) -> Tensor:
        return torch.logsumexp(self.teacher_NV / temperature, -1)

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self.label_N))


def make_case(tokens: int, vocab: int) -> Case:
    """Return inputs whose teacher has about the entropy of a small model on prose."""
    generator = torch.Generator().manual_seed(0)
    width = HIDDEN.get(vocab, 576)
    hidden_ND = torch.randn(tokens, width, generator=generator)
    weight_VD = torch.randn(vocab, width, generator=generator) / width**0.5
    teacher_NV = torch.randn(tokens, vocab, generator=generator).mul_(3.2)
    teacher_NV = torch.log_softmax(teacher_NV, -1)
    label_N = torch.multinomial(teacher_NV.exp(), 1, generator=generator)[:, 0]
    return Case(hidden_ND.requires_grad_(), weight_VD.requires_grad_(), teacher_NV, label_N)


Step = Callable[[], Any]


def matmuls(case: Case) -> Step:
    """Logits, gradient of the hidden states, gradient of the weight, into existing memory."""
    hidden_ND, weight_VD = case.hidden_ND.detach(), case.weight_VD.detach()
    logits_NV = hidden_ND @ weight_VD.T
    grad_hidden, grad_weight = torch.empty_like(hidden_ND), torch.empty_like(weight_VD)

    def step() -> None:
        torch.mm(hidden_ND, weight_VD.T, out=logits_NV)
        torch.mm(logits_NV, weight_VD, out=grad_hidden)
        torch.mm(logits_NV.T, hidden_ND, out=grad_weight)

    return step


def ours(case: Case, targets: HeadTargets, spec: LossSpec) -> Step:
    """The fused head."""
    fused = FusedSpec(spec, CHUNK)

    def step() -> None:
        loss = fused_head_loss(case.hidden_ND, case.weight_VD, None, targets, spec=fused).loss
        torch.autograd.grad(loss, (case.hidden_ND, case.weight_VD))

    return step


def with_head(case: Case, temperature: float, divergence_of: Callable[[Tensor], Tensor]) -> Step:
    """The head, a peer's divergence of the logits, and cross-entropy."""

    def step() -> None:
        logits_NV = functional.linear(case.hidden_ND, case.weight_VD)
        kd = divergence_of(logits_NV)
        ce = functional.cross_entropy(logits_NV, case.label_N, reduction="sum")
        loss = ALPHA * temperature**2 * kd + (1 - ALPHA) * ce
        torch.autograd.grad(loss, (case.hidden_ND, case.weight_VD))

    return step


def dense_kl(case: Case, temperature: float) -> Step:
    """torch's own kl_div over the vocabulary."""

    def divergence(logits_NV: Tensor) -> Tensor:
        return functional.kl_div(
            torch.log_softmax(logits_NV / temperature, -1),
            torch.log_softmax(case.teacher_NV / temperature, -1),
            reduction="sum", log_target=True,
        )  # fmt: skip

    return with_head(case, temperature, divergence)


def distillkit(case: Case, temperature: float, targets: HeadTargets) -> Step:
    """DistillKit's sparse KL, missing probability `zero`: teacher renormalised over its ids."""
    log_p_NK = torch.log_softmax(targets.logprobs_NK / temperature, -1)

    def divergence(logits_NV: Tensor) -> Tensor:
        scaled_NV = logits_NV.float() / temperature
        log_q_NK = scaled_NV.gather(1, targets.ids_NK) - scaled_NV.logsumexp(-1, keepdim=True)
        return (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum()

    return with_head(case, temperature, divergence)


def axolotl(case: Case, temperature: float, targets: HeadTargets) -> Step:
    """Axolotl's chunked forward KL: as above, over eight chunks of tokens."""
    log_p_NK = torch.log_softmax(targets.logprobs_NK / temperature, -1)

    def divergence(logits_NV: Tensor) -> Tensor:
        total = logits_NV.new_zeros(())
        for z_nV, ids_nK, log_p_nK in zip(
            logits_NV.chunk(8), targets.ids_NK.chunk(8), log_p_NK.chunk(8), strict=True
        ):
            z_nK = z_nV.gather(1, ids_nK) / temperature
            log_q_nK = z_nK - torch.logsumexp(z_nV / temperature, -1, keepdim=True)
            total = total + (log_p_nK.exp() * (log_p_nK - log_q_nK)).sum()
        return total

    return with_head(case, temperature, divergence)


def verl(case: Case, temperature: float, targets: HeadTargets) -> Step:
    """verl's top-k forward KL: not renormalised, the student's full log-softmax gathered."""
    log_p_NK = targets.logprobs_NK / temperature - targets.log_z_N[:, None]

    def divergence(logits_NV: Tensor) -> Tensor:
        log_q_NK = torch.log_softmax(logits_NV / temperature, -1).gather(1, targets.ids_NK)
        return (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum()

    return with_head(case, temperature, divergence)


def liger(case: Case, temperature: float) -> Step:
    """Liger's chunked fused linear JSD, its torch form: dense, gradient in the forward pass."""

    def step() -> None:
        hidden_ND, weight_VD = case.hidden_ND.detach(), case.weight_VD.detach()
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD)
        size = CHUNK
        for start in range(0, len(hidden_ND), size):
            rows = slice(start, start + size)
            h_nD = hidden_ND[rows].requires_grad_()
            w_VD = weight_VD.requires_grad_()
            with torch.enable_grad():
                z_nV = functional.linear(h_nD, w_VD)
                log_q_nV = torch.log_softmax(z_nV / temperature, -1)
                log_p_nV = torch.log_softmax(case.teacher_NV[rows] / temperature, -1)
                log_m_nV = torch.log(0.5 * log_q_nV.exp() + 0.5 * log_p_nV.exp())
                kd = 0.5 * functional.kl_div(log_m_nV, log_p_nV, reduction="sum", log_target=True)
                kd = kd + 0.5 * functional.kl_div(
                    log_m_nV, log_q_nV, reduction="sum", log_target=True
                )
                ce = functional.cross_entropy(z_nV, case.label_N[rows], reduction="sum")
                loss = ALPHA * temperature**2 * kd + (1 - ALPHA) * ce
            grads = torch.autograd.grad(loss, (h_nD, w_VD))
            grad_hidden[rows] = grads[0]
            grad_weight += grads[1]

    return step


def contenders(case: Case, temperature: float) -> dict[str, Step]:
    """Return the steps by name; names of this project's start with `here`."""
    top_k, sampled = case.top_k(temperature), case.sampled(temperature)
    count = int(torch.isfinite(sampled.logprobs_NK).sum()) / len(case.label_N)
    skew = LossSpec(temperature, ALPHA, divergence="skew_kl")
    across = {}
    if temperature == 1.0:
        uld = LossSpec(temperature, ALPHA, cross_tokenizer="uld")
        across = {f"here, ULD, top-{TOP_K}": ours(case, top_k, uld)}
    return {
        f"here, top-{TOP_K} and bucket": ours(case, top_k, LossSpec(temperature, ALPHA)),
        f"here, sampled, {count:.0f} entries": ours(case, sampled, LossSpec(temperature, ALPHA)),
        f"here, skew KL, top-{TOP_K}": ours(case, top_k, skew),
        **across,
        "dense KL": dense_kl(case, temperature),
        "DistillKit zero, rebuilt": distillkit(case, temperature, top_k),
        "Axolotl, 8 chunks, rebuilt": axolotl(case, temperature, top_k),
        "verl, rebuilt": verl(case, temperature, top_k),
        "Liger JSD (torch), rebuilt": liger(case, temperature),
    }


def cpu_seconds(step: Step) -> float:
    """Return the CPU seconds of one call."""
    start = time.process_time()
    step()
    return time.process_time() - start


def extra_bytes(case: Case, step: Step) -> int:
    """Return the allocator's peak during a call, without the two gradients."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    # One array of a gradient's size is the gradient, a second one at the same time is not.
    alive = {4 * case.hidden_ND.numel(): 0, 4 * case.weight_VD.numel(): 0}
    for _, change in changes:
        held += change
        if abs(change) in alive:
            alive[abs(change)] += 1 if change > 0 else -1
        peak = max(peak, held - sum(size for size, count in alive.items() if count > 0))
    return peak


def main() -> None:
    """Print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--only", default="", help="only contenders whose names begin with this")
    parser.add_argument("--time_only", action="store_true", help="do not measure memory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'V':>8} {'T':>3}  {'loss':<28} {'time / matmuls':>14} {'extra memory':>30}")
    worst: dict[int, float] = {}
    chunks = 0.0
    for vocab in args.vocabularies:
        case = make_case(args.tokens, vocab)
        for temperature in args.temperatures:
            chosen = {
                name: step
                for name, step in contenders(case, temperature).items()
                if name.startswith(args.only)
            }
            steps = {"three matmuls": matmuls(case), **chosen}
            memory = {
                name: 0 if args.time_only else extra_bytes(case, step)
                for name, step in steps.items()
            }
            rounds = [
                {name: cpu_seconds(step) for name, step in steps.items()}
                for _ in range(args.rounds)
            ]
            for name in steps:
                ratio = statistics.median(t[name] / t["three matmuls"] for t in rounds)
                arrays = memory[name] / (4 * args.tokens * vocab)
                in_chunks = memory[name] / (4 * min(CHUNK, args.tokens) * vocab)
                extra = f"{arrays:.2f} [tokens, V]"
                if name.startswith("here"):
                    extra = f"{in_chunks:.2f} chunks = {extra}"
                    worst[vocab] = max(worst.get(vocab, 0.0), ratio)
                    chunks = max(chunks, in_chunks)
                line = f"{vocab:>8} {temperature:>3g}  {name:<28} {ratio:>14.2f} {extra:>30}"
                print(line, flush=True)
    for vocab, ratio in worst.items():
        print(f"FIGURE loss_over_matmuls_{vocab // 1000}k {ratio:.3f}".replace("151k", "152k"))
    if not args.time_only:
        print(f"FIGURE loss_extra_chunks {chunks:.3f}")


if __name__ == "__main__":
    main()
