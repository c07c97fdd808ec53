"""Mean teachers from sampled caches against averaging their dense distributions.

`make bench-mixture`. Two synthetic teachers of one text, each through the production path with a
scheme of its own (sampler, codec, Parquet, reader), are joined as `data.teachers mean` joins them.
The gradient of the loss on the student's logits is taken many times under other sample ids, on
which the sampling depends, and compared with the gradient of the dense mean teacher, along four
fixed directions. In standard errors of the draws; a bias that the training could see would exceed
them. Of four numbers the largest is 3 or more once in a hundred runs.
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
TOKENS, WIDTH, VOCABULARY, REPEATS = 16, 32, 2000, 50


def text(seed: int, repeats: int, weight_VD: Tensor) -> tuple[Hidden, Hidden, Tensor]:
    """Return the same text for two teachers, its positions repeated, and the student's logits."""
    rng = np.random.default_rng(seed)
    common_ND = rng.normal(0, 1, (TOKENS, WIDTH))
    teachers = [common_ND + rng.normal(0, spread, common_ND.shape) for spread in (0.2, 0.5)]
    student_ND = torch.from_numpy(common_ND + rng.normal(0, 0.4, common_ND.shape)).float()
    ids_L = rng.integers(0, VOCABULARY, TOKENS + 1).astype(np.int32)
    mask_L = np.arange(TOKENS + 1) > 0
    sides = [
        Hidden(
            teacher_ND=np.tile(teacher_ND, (repeats, 1)).astype(np.float16),
            student_ND=np.zeros((0, WIDTH), np.float16),
            weight_VD=weight_VD.numpy(),
            label_N=np.tile(ids_L[1:].astype(np.int64), repeats),
            sample_ids=[hashlib.md5(f"{i}".encode()).hexdigest() for i in range(repeats)],
            input_ids=[ids_L] * repeats,
            loss_mask=[mask_L] * repeats,
        )
        for teacher_ND in teachers
    ]
    return sides[0], sides[1], student_ND @ weight_VD.t()


def joined(sides: tuple[Hidden, Hidden], weight_VD: Tensor, draw: int, temperature: float) -> Batch:
    """Return both teachers' targets of all positions, as the stream gives them."""
    first, second = (
        through_the_cache(side.redrawn(draw + 1), weight_VD, scheme).rows
        for side, scheme in zip(sides, SCHEMES, strict=True)
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
        batch.label_ids_N, batch.share_N,
    )  # fmt: skip
    taught_NV = logits_NV.repeat_interleave(len(WEIGHTS), 0).requires_grad_()
    (found_NV,) = torch.autograd.grad(logits_loss(taught_NV, targets, spec=spec).loss, taught_NV)
    return found_NV.reshape(len(logits_NV), len(WEIGHTS), -1).sum(1)


def dense_gradient(
    logits_NV: Tensor, sides: tuple[Hidden, Hidden], weight_VD: Tensor, temperature: float
) -> Tensor:
    """Return T (q_T - sum_i w_i p_iT), the gradient of T^2 KL to the mean teacher, in float64."""
    mean_NV = sum(
        weight
        * torch.softmax(
            (torch.from_numpy(side.teacher_ND[:TOKENS]).float() @ weight_VD.t()).double()
            / temperature,
            -1,
        )
        for weight, side in zip(WEIGHTS, sides, strict=True)
    )
    return temperature * (torch.softmax(logits_NV.double() / temperature, -1) - mean_NV)


def standard_errors(temperature: float, draws: int, seed: int) -> list[float]:
    """Return the bias along each direction, in standard errors."""
    generator = torch.Generator().manual_seed(seed)
    weight_VD = torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.5
    first, second, logits_NV = text(seed, REPEATS, weight_VD)
    exact_NV = dense_gradient(logits_NV, (first, second), weight_VD, temperature)
    student_NV = torch.softmax(logits_NV.double(), -1)
    random = torch.randn(2, *exact_NV.shape, generator=generator, dtype=torch.float64)
    directions = [exact_NV, student_NV, *random]
    spec = LossSpec(
        temperature, 1.0, sampled_log_step=SCHEMES[0].quantisation.sampled_step, rule_highest=2.0
    )
    found: list[Tensor] = []
    repeated_NV = logits_NV.repeat(REPEATS, 1)
    for draw in range(draws):
        batch = joined((first, second), weight_VD, draw, temperature)
        off_RNV = gradient(repeated_NV, batch, spec).double().reshape(REPEATS, *exact_NV.shape)
        off_RNV -= exact_NV
        found.append(torch.stack([(off_RNV * d).sum((1, 2)) for d in directions], 1))
    values_RD = torch.cat(found)
    errors_D = values_RD.std(0) / len(values_RD) ** 0.5
    return (values_RD.mean(0) / errors_D).tolist()


def main() -> None:
    """Print the biases and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=8, help=f"each of {REPEATS} samples")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    worst = 0.0
    print(
        f"bias of the mean of {len(WEIGHTS)} sampled teachers, in standard errors of "
        f"{options.draws * REPEATS} draws; along the exact gradient, the student, two at random"
    )
    for temperature in (1.0, 2.0):
        biases = standard_errors(temperature, options.draws, options.seed)
        print(f"T = {temperature:g}: " + "  ".join(f"{bias:+.2f}" for bias in biases))
        worst = max(worst, *map(abs, biases))
    print(f"FIGURE mixture_bias_in_standard_errors {worst:.2f}")


if __name__ == "__main__":
    main()
