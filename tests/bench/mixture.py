"""Mean teachers from sampled caches against averaging their dense distributions.

`make bench-mixture`. Two synthetic teachers of one text, each through the production path with a
scheme of its own (sampler, codec, Parquet, reader), are joined as `data.teachers mean` joins them.
The gradient of the loss on the student's logits is compared with that of the dense mean teacher,
along four directions, sequence by sequence: each has a text and a sampling of its own, so that the
rounding of stored log-probs is part of the noise, as it is in training. In standard errors over
sequences; a bias that the training could see would exceed them. Of eight numbers without bias the
largest is 3 or more in 2 of 100 runs.
"""

from __future__ import annotations

import argparse
import hashlib

import numpy as np
import torch
from torch import Tensor

from pipeline.data.collate import Batch, collate
from pipeline.data.mixture.rows import MixedSequence
from pipeline.loss.logits import logits_loss
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from tests.bench.fidelity import sampled
from tests.bench.fidelity_cache import through_the_cache
from tests.bench.fidelity_data import Hidden

WEIGHTS = (0.7, 0.3)
SCHEMES = (sampled(1 / 9, 1 / 23.5), sampled(1 / 5, 1 / 12, top_k=4))
TOKENS, WIDTH, VOCABULARY, SEQUENCES = 16, 32, 2000, 50


def text(seed: int, weight_VD: Tensor) -> tuple[list[Hidden], Tensor]:
    """Return the same sequences for two teachers, and the student's logits of their positions."""
    rng = np.random.default_rng(seed)
    common_ND = rng.normal(0, 1, (SEQUENCES * TOKENS, WIDTH))
    student_ND = torch.from_numpy(common_ND + rng.normal(0, 0.4, common_ND.shape)).float()
    ids = rng.integers(0, VOCABULARY, (SEQUENCES, TOKENS + 1)).astype(np.int32)
    mask_L = np.arange(TOKENS + 1) > 0
    sides = [
        Hidden(
            teacher_ND=(common_ND + rng.normal(0, apart, common_ND.shape)).astype(np.float16),
            student_ND=np.zeros((0, WIDTH), np.float16),
            weight_VD=weight_VD.numpy(),
            label_N=ids[:, 1:].astype(np.int64).flatten(),
            sample_ids=[hashlib.md5(f"{seed}:{i}".encode()).hexdigest() for i in range(SEQUENCES)],
            input_ids=list(ids),
            loss_mask=[mask_L] * SEQUENCES,
        )
        for apart in (0.2, 0.5)
    ]
    return sides, student_ND @ weight_VD.t()


def joined(sides: list[Hidden], weight_VD: Tensor, temperature: float) -> Batch:
    """Return both teachers' targets of all positions, as the stream gives them."""
    # Other noise for each teacher: their samples are independent, as the tests of one are.
    first, second = (
        through_the_cache(side.redrawn(number), weight_VD, scheme).rows
        for number, (side, scheme) in enumerate(zip(sides, SCHEMES, strict=True))
    )
    rows = [
        MixedSequence(
            a.sample_id, a.input_ids_L, a.loss_mask_L, a.targets,
            others=((1, b.targets),), weights=WEIGHTS,
        )
        for a, b in zip(first, second, strict=True)
    ]  # fmt: skip
    return collate(rows, temperature=temperature)


def gradient(logits_NV: Tensor, batch: Batch, spec: LossSpec) -> Tensor:
    """Return the gradient on the logits of each position, its teachers' parts added up."""
    targets = HeadTargets(
        batch.ids_NK, batch.logprobs_NK, batch.inclusion_NK, batch.log_z_N, batch.entropy_N,
        batch.label_ids_N, weight_N=batch.share_N,
    )  # fmt: skip
    taught_NV = logits_NV.repeat_interleave(len(WEIGHTS), 0).requires_grad_()
    (found_NV,) = torch.autograd.grad(logits_loss(taught_NV, targets, spec=spec).loss, taught_NV)
    return found_NV.reshape(len(logits_NV), len(WEIGHTS), -1).sum(1)


def dense_gradient(
    logits_NV: Tensor, sides: list[Hidden], weight_VD: Tensor, temperature: float
) -> Tensor:
    """Return T (q_T - sum_i w_i p_iT), the gradient of T^2 KL to the mean teacher, in float64."""
    mean_NV = torch.zeros_like(logits_NV, dtype=torch.float64)
    for weight, side in zip(WEIGHTS, sides, strict=True):
        teacher_NV = (torch.from_numpy(side.teacher_ND).float() @ weight_VD.t()).double()
        mean_NV += weight * torch.softmax(teacher_NV / temperature, -1)
    return temperature * (torch.softmax(logits_NV.double() / temperature, -1) - mean_NV)


def standard_errors(temperature: float, draws: int, seed: int) -> list[float]:
    """Return the bias along each direction, in standard errors."""
    generator = torch.Generator().manual_seed(seed)
    weight_VD = torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.5
    random_V = torch.randn(2, VOCABULARY, generator=generator, dtype=torch.float64)
    spec = LossSpec(
        temperature, 1.0, sampled_log_step=SCHEMES[0].quantisation.sampled_step, rule_highest=2.0
    )
    found: list[Tensor] = []
    for draw in range(draws):
        sides, logits_NV = text(1000 * seed + draw, weight_VD)
        exact_NV = dense_gradient(logits_NV, sides, weight_VD, temperature)
        off_NV = gradient(logits_NV, joined(sides, weight_VD, temperature), spec).double()
        off_NV -= exact_NV
        directions = [exact_NV, torch.softmax(logits_NV.double(), -1), *random_V]
        along_ND = torch.stack([(off_NV * d).sum(-1) for d in directions], 1)
        found.append(along_ND.reshape(SEQUENCES, TOKENS, -1).sum(1))
    values_SD = torch.cat(found)
    errors_D = values_SD.std(0) / len(values_SD) ** 0.5
    return (values_SD.mean(0) / errors_D).tolist()


def main() -> None:
    """Print the biases and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=20, help=f"each of {SEQUENCES} sequences")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    worst = 0.0
    print(
        f"bias of the mean of {len(WEIGHTS)} sampled teachers, in standard errors over "
        f"{options.draws * SEQUENCES} sequences of {TOKENS} tokens;\n"
        "along the exact gradient, the student, two at random"
    )
    for temperature in (1.0, 2.0):
        biases = standard_errors(temperature, options.draws, options.seed)
        print(f"T = {temperature:g}: " + "  ".join(f"{bias:+.2f}" for bias in biases))
        worst = max(worst, *map(abs, biases))
    print(f"FIGURE mixture_bias_in_standard_errors {worst:.2f}")


if __name__ == "__main__":
    main()
