"""The KL that a cache's held-out rows give, against the dense one of the same tokens.

`make bench-heldout`: for a student near the teacher (the teacher without two layers) and one that
is far (pruned, not trained), at both temperatures, what the default's held-out rows give, what its
training rows would give, and how often a cache's own likeliest token is the teacher's. Everything
runs through the production code: sampler, codec, Parquet, reader, collation, loss.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.collate import Batch
from pipeline.loss.chunk_gradient import sparse_loss_
from pipeline.loss.spec import LossSpec
from pipeline.models.load import load_causal_lm
from pipeline.models.resolve import resolve_model
from pipeline.student.build.prune import prune_model
from pipeline.teacher.settings import CaptureSettings
from pipeline.teacher.sparsify.device import SparseScheme
from pipeline.teacher.sparsify.scheme import capture_scheme
from tests.bench.fidelity_cache import Cached, head_targets, through_the_cache
from tests.bench.fidelity_data import FOLDER, Hidden, hidden_states
from tests.bench.quality import LAYERS

CHUNK = 64
GRID = (1.0, 2.0)


def schemes() -> dict[str, SparseScheme]:
    """Return the defaults: what is kept of held-out and of training rows, and the sampled ones."""
    default = capture_scheme(CaptureSettings())
    assert default.heldout is not None
    alone = CaptureSettings(scheme="threshold", temperatures=(1.0,))
    return {
        "held-out rows": default.heldout,
        "training rows": default,
        "threshold": capture_scheme(CaptureSettings(scheme="threshold")),
        "threshold, T = 1": capture_scheme(alone),
    }


def dense_kl(student_RV: Tensor, teacher_RV: Tensor, temperature: float) -> NDArray[np.float64]:
    """Return KL(p_T | q_T) of rows over the whole vocabulary."""
    log_p_RV = torch.log_softmax(teacher_RV.double() / temperature, -1)
    log_q_RV = torch.log_softmax(student_RV.double() / temperature, -1)
    return (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(-1).numpy()


def cached_kl(
    student_RV: Tensor, batch: Batch, rows: slice, scheme: SparseScheme
) -> NDArray[np.float64]:
    """Return the KL of rows as a student's evaluation computes it from the cache."""
    spec = LossSpec(
        batch.temperature,
        1.0,
        sampled_log_step=scheme.quantisation.sampled_step,
        rule_highest=scheme.rule.highest if scheme.rule else 0.0,
    ).for_measuring(batch.temperature)
    targets = head_targets(batch).rows(rows.start, rows.stop)
    return sparse_loss_(student_RV.clone(), targets, spec, gradient=False).divergence_N.numpy()


def students_kl(
    hidden: Hidden, caches: dict[str, list[Cached]], kinds: dict[str, SparseScheme]
) -> dict[tuple[str, float, int], NDArray[np.float64]]:
    """Return the KL of every token by scheme, temperature and draw; `dense` among the schemes."""
    weight_VD = torch.from_numpy(hidden.weight_VD)
    batches = {
        (name, temperature, draw): cached.batch(temperature)
        for name, draws in caches.items()
        for draw, cached in enumerate(draws)
        for temperature in GRID
        if temperature in kinds[name].temperatures
    }
    found: dict[tuple[str, float, int], list[NDArray[np.float64]]] = {}
    for start in range(0, len(hidden.label_N), CHUNK):
        rows = slice(start, min(start + CHUNK, len(hidden.label_N)))
        teacher_RV = torch.from_numpy(hidden.teacher_ND[rows]).float() @ weight_VD.t()
        student_RV = torch.from_numpy(hidden.student_ND[rows]).float() @ weight_VD.t()
        for temperature in GRID:
            exact = dense_kl(student_RV, teacher_RV, temperature)
            found.setdefault(("dense", temperature, 0), []).append(exact)
        for key, batch in batches.items():
            kl_R = cached_kl(student_RV, batch, rows, kinds[key[0]])
            found.setdefault(key, []).append(kl_R)
    return {key: np.concatenate(parts) for key, parts in found.items()}


def top1(hidden: Hidden, cached: Cached) -> float:
    """Return the share of tokens whose likeliest by the cache has the teacher's largest logit."""
    weight_VD = torch.from_numpy(hidden.weight_VD)
    largest_N = cached.batch(1.0).largest_N
    assert largest_N is not None
    right = 0
    for start in range(0, len(largest_N), CHUNK):
        rows = slice(start, start + CHUNK)
        teacher_RV = torch.from_numpy(hidden.teacher_ND[rows]).float() @ weight_VD.t()
        mine_R = teacher_RV.gather(-1, largest_N[rows, None])[:, 0]
        right += int((mine_R == teacher_RV.amax(-1)).sum())
    return right / len(largest_N)


@torch.no_grad()
def _pruned(hidden: Hidden) -> Hidden:
    """Return the same tokens with the hidden states of a student of six layers, not trained."""
    source = resolve_model("embedded", revision=None, role="teacher").path
    folder = prune_model(source, LAYERS, FOLDER / f"heldout-cut-{len(LAYERS)}")
    model = load_causal_lm(folder, dtype="float32", trust_remote_code=False).eval()
    parts = []
    for ids_L, mask_L in zip(hidden.input_ids, hidden.loss_mask, strict=True):
        ids_1L = torch.from_numpy(ids_L.astype(np.int64))[None]
        states_LD = model.model(ids_1L, use_cache=False).last_hidden_state[0]
        parts.append(states_LD[np.flatnonzero(mask_L) - 1])
    return replace(hidden, student_ND=torch.cat(parts).numpy().astype(np.float16))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--draws", type=int, default=2, help="of each scheme with sampled entries")
    arguments = parser.parse_args()
    near = hidden_states(arguments.tokens).head(arguments.tokens)
    weight_VD, kinds = torch.from_numpy(near.weight_VD), schemes()
    caches = {
        name: [
            through_the_cache(near.redrawn(draw), weight_VD, kind)
            for draw in range(arguments.draws if kind.rule else 1)
        ]
        for name, kind in kinds.items()
    }
    tokens = len(near.label_N)
    print(f"{tokens} tokens; KL in nats, and by how much a cache's is off, in %")
    worst = 0.0
    for student in ("near", "untrained"):
        kl = students_kl(near if student == "near" else _pruned(near), caches, kinds)
        for name, temperature, draw in sorted(kl, key=lambda key: (key[1], key[2], key[0])):
            values_N, exact_N = kl[name, temperature, draw], kl["dense", temperature, 0]
            exact = exact_N.mean()
            gap = 100 * (values_N.mean() / exact - 1)
            error = 100 * (values_N - exact_N).std() / np.sqrt(tokens) / exact
            print(
                f"{student:<10} T = {temperature:g} draw {draw} {name:<17} "
                f"{values_N.mean():.5f} {gap:+7.2f} ± {error:.2f}",
                flush=True,
            )
            if name == "held-out rows":
                worst = max(worst, abs(gap))
    shares = {name: 100 * top1(near, draws[0]) for name, draws in caches.items()}
    for name, share in shares.items():
        print(
            f"{name:<17} {caches[name][0].entries:6.1f} entries, "
            f"{caches[name][0].bytes_per_token:6.1f} bytes a token; likeliest token {share:.3f} %"
        )
    print(f"FIGURE kl_bound_gap_percent {worst:.2f}")
    print(f"FIGURE top1_of_teacher_percent {min(shares.values()):.3f}")


if __name__ == "__main__":
    main()
