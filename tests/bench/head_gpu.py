"""What the loss with the head costs on a GPU: estimated by bytes and operations, and measured.

    python -m tests.bench.head_gpu [--tokens 8192] [--vocab 151669] [--hidden 2048 4096]
        [--measure]

The estimate is arithmetic: matrix products at a rate, everything else at the memory's bandwidth or
at a launch each. `--measure` times the same parts on this machine's GPU (without one, on its CPU)
in bfloat16, so that the first run on a GPU refutes or confirms the table.

"Before": 512 rows a chunk, a 16-bit product beside the float32 sum, one kernel an operation on
entries. "Now": `chunk_layout` on that GPU, the product added to the sum, entries compiled.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.loss.fused import FusedSpec, fused_head_loss
from pipeline.loss.gpu.chunks import aligned, chunk_layout
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from pipeline.observe.devices import DEVICES, Device

PRODUCT_SHARE, BANDWIDTH_SHARE = 0.66, 0.84
"""Of the data sheet's peaks: 650 TFLOP/s and 2.8 TB/s of an H100."""
LAUNCH_S = 3e-6
"""A kernel of [N, K]: its launch."""
OPERATIONS = {"top-k": 92, "sampled": 161}
"""On the entries of a chunk before they were compiled; `test_loss_gpu_layout.py` counts them."""
COMPILED = {"top-k": 15, "sampled": 18}
"""The same, compiled by Inductor's backend for CPUs; counted there as well."""
OTHERS = 4
"""Of a chunk: two passes over the logits, and two scatters around them."""


@dataclass(frozen=True)
class Costs:
    """Seconds of a forward and backward pass of the head with the loss, by part."""

    products: float
    sums: float
    """Of the weight's gradient over the chunks."""
    scaling: float
    """Of that sum in the backward pass."""
    passes: float
    """Over the logits: sums of exponentials, gradient."""
    small: float
    """Kernels on entries."""

    @property
    def over_products(self) -> float:
        """All parts over the matrix products."""
        return sum(vars(self).values()) / self.products


def estimate(
    device: Device, *, tokens: int, vocab: int, hidden: int, now: bool, targets: str = "top-k"
) -> Costs:
    """Estimate one pass.

    Args:
        device: by its data sheet.
        tokens: N, supervised.
        vocab: U.
        hidden: D.
        now: as it is, or as it was before.
        targets: `top-k` or `sampled`.
    """
    layout = chunk_layout(
        chunk_rows=None if now else 512, vocab=vocab, head_rows=aligned(vocab), element_bytes=2,
        device_bytes=int(device.memory_gib * 2**30),
    )  # fmt: skip
    chunks = -(-tokens // layout.rows)
    weights, logits = vocab * hidden, tokens * vocab
    bandwidth = BANDWIDTH_SHARE * device.bytes_per_s
    # The first chunk only writes; later ones read and write 4 bytes a weight. Before, a 16-bit
    # product was written and read as well.
    sums = 4 + 8 * (chunks - 1) + (0 if now else 4 * chunks)
    kernels = (COMPILED if now else OPERATIONS)[targets] + OTHERS
    return Costs(
        products=3 * 2 * logits * hidden / (PRODUCT_SHARE * device.flops),
        sums=sums * weights / bandwidth,
        scaling=(6 if now else 14) * weights / bandwidth,
        passes=6 * logits / bandwidth,
        small=kernels * chunks * LAUNCH_S,
    )


def measure(*, tokens: int, vocab: int, hidden: int, rounds: int, top_k: int = 64) -> list[str]:
    """Return lines with the milliseconds of the same parts on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = {"dtype": torch.bfloat16, "device": device}
    torch.manual_seed(0)
    hidden_ND = torch.randn(tokens, hidden, **kind).requires_grad_()
    weight_VD = (torch.randn(aligned(vocab), hidden, **kind) / hidden**0.5).requires_grad_()
    targets = HeadTargets(
        ids_NK=torch.rand(tokens, vocab, device=device).topk(top_k).indices,
        logprobs_NK=torch.full((tokens, top_k), -5.0, device=device),
        inclusion_NK=None,
        log_z_N=torch.zeros(tokens, device=device),
        entropy_N=torch.zeros(tokens, device=device),
        label_N=torch.randint(0, vocab, (tokens,), device=device),
    )

    def products(width: int) -> Callable[[], None]:
        grad_nP = torch.randn(min(tokens, 4096), width, **kind)
        weight_PD, hidden_nD = weight_VD[:width].detach(), hidden_ND[:4096].detach()

        def step() -> None:
            for _ in range(0, tokens, 4096):
                torch.mm(hidden_nD, weight_PD.t(), out=grad_nP)
                grad_nP @ weight_PD
                grad_nP.t() @ hidden_nD

        return step

    def head(chunk_rows: int | None, *, compiled: bool) -> Callable[[], None]:
        spec = FusedSpec(LossSpec(1.0, 0.5), chunk_rows, None, vocab, compiled)

        def step() -> None:
            loss = fused_head_loss(hidden_ND, weight_VD, None, targets, spec=spec).loss
            torch.autograd.grad(loss, (hidden_ND, weight_VD))

        return step

    parts = {
        f"three products, {vocab} wide": products(vocab),
        f"three products, {aligned(vocab)} wide": products(aligned(vocab)),
        "loss with the head, 512 rows, entries not compiled": head(512, compiled=False),
        "loss with the head, now": head(None, compiled=True),
    }
    return [
        f"measured on {device.type}, D = {hidden}: {name:<52} {1e3 * seconds(step, rounds):9.2f} ms"
        for name, step in parts.items()
    ]


def seconds(step: Callable[[], None], rounds: int) -> float:
    """Return the median time of a call, after one that compiles and warms up."""
    taken = []
    for turn in range(rounds + 1):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if turn:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="h100", choices=sorted(DEVICES))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151_669)
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    device = DEVICES[args.device]
    print(f"{device.name}, {args.tokens} tokens, V = {args.vocab}, bfloat16, top-k; milliseconds")
    print(
        f"{'D':>5} {'':<7} {'products':>9} {'sums':>7} {'scaling':>8} {'passes':>7} {'small':>6} "
        f"{'over products':>14}"
    )
    for hidden in args.hidden:
        for now in (False, True):
            costs = estimate(device, tokens=args.tokens, vocab=args.vocab, hidden=hidden, now=now)
            ms = {name: 1e3 * value for name, value in vars(costs).items()}
            print(
                f"{hidden:>5} {'now' if now else 'before':<7} {ms['products']:>9.1f} "
                f"{ms['sums']:>7.1f} {ms['scaling']:>8.1f} {ms['passes']:>7.1f} "
                f"{ms['small']:>6.1f} {costs.over_products:>14.2f}"
            )
    if args.measure:
        for hidden in args.hidden:
            for line in measure(
                tokens=args.tokens, vocab=args.vocab, hidden=hidden, rounds=args.rounds
            ):
                print(line)


if __name__ == "__main__":
    main()
