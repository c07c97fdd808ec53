"""Students trained from sparse caches against one trained on dense teacher logits.

Same student, sequences, order, optimiser and steps; only the target differs. Held-out KL to the
teacher is computed densely for all of them. Each run's result is kept below `runs/bench/quality`,
so that a stopped bench can continue; `make bench-quality` runs what is missing and prints the
table. Targets of other projects run by their code from a checkout (`--peer distillkit=PATH`), or
are rebuilt on exact log-probs and say so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.nearest import did_you_mean
from pipeline.data.collate import collate
from pipeline.errors import ConfigError, run_command
from pipeline.loss.chunk_gradient import LossSpec
from pipeline.loss.fused import FusedSpec, fused_head_loss
from pipeline.models.load import load_causal_lm
from pipeline.models.resolve import resolve_model
from pipeline.student.build.prune import prune_model
from pipeline.student.build.reconstruct import reconstruct_student
from tests.bench.fidelity_cache import head_targets, through_the_cache
from tests.bench.fidelity_data import FOLDER, Hidden, hidden_states, sequences
from tests.bench.fidelity_run import sampled
from tests.bench.peers.adapters import PROJECTS, add_peer_option, caption, peers_of
from tests.bench.peers.checkout import parse
from tests.bench.peers.rebuilt import truncated
from tests.bench.peers.seam import Loss, Peer, rows_of

LAYERS = (0, 6, 12, 18, 24, 29)
RESULTS = FOLDER / "quality"
LEARNING_RATE = 4e-4
SCHEMES = {1.0: sampled(1 / 28), 2.0: sampled(1 / 9, 1 / 23.5)}
OURS = ("dense", "sampled")
TRUNCATED = "top-64 truncated"
PEERS = ("DistillKit budget, zero",)
"""Rows of other projects' caches that are trained unless `--target` names others."""
Targets = dict[str, tuple[Peer, Loss]]


def student_folder() -> Path:
    """Return the pruned and reconstructed student from which all runs start; computed once."""
    folder = FOLDER / f"quality-student-{len(LAYERS)}"
    if (folder / "config.json").exists():
        return folder
    source = resolve_model("embedded", revision=None, role="teacher").path
    cut = prune_model(source, LAYERS, FOLDER / f"quality-cut-{len(LAYERS)}")
    student = load_causal_lm(cut, dtype="float32", trust_remote_code=False).eval()
    teacher = load_causal_lm(source, dtype="float32", trust_remote_code=False).eval()
    reconstruct_student(student, teacher, LAYERS, sequences(65_536)[-40:])
    student.save_pretrained(folder)
    return folder


@torch.no_grad()
def with_pruned_student(hidden: Hidden) -> Hidden:
    """Return the same tokens with the hidden states of the student from which all runs start."""
    model = load_causal_lm(student_folder(), dtype="float32", trust_remote_code=False).eval()
    parts = [_hidden(model, hidden, index) for index in range(len(hidden.input_ids))]
    return replace(hidden, student_ND=torch.cat(parts).numpy().astype(np.float16))


def split(hidden: Hidden, train: int, heldout: int) -> tuple[Hidden, Hidden]:
    """Return the first sequences to train on and the next ones to score on."""
    return hidden.part(0, train), hidden.part(train, train + heldout)


def run(
    target: str,
    temperature: float,
    seed: int,
    per_step: int,
    train: Hidden,
    heldout: Hidden,
    others: Targets,
) -> list[float]:
    """Train one student and return the held-out KL (T = 1, dense) of each sequence."""
    torch.manual_seed(seed)
    model = load_causal_lm(student_folder(), dtype="float32", trust_remote_code=False)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.train()
    weight_VD = torch.from_numpy(train.weight_VD)
    loss = _loss(target, temperature, train, weight_VD, others.get(target))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    order = np.random.default_rng(seed).permutation(len(train.input_ids))
    steps = len(order) // per_step
    for step in range(steps):
        rate = min(1.0, (step + 1) / max(1, steps // 20))
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * rate
        chosen = order[step * per_step : (step + 1) * per_step]
        hidden_ND = torch.cat([_hidden(model, train, int(i)) for i in chosen])
        total = loss(hidden_ND, model.get_output_embeddings().weight, chosen)
        (total / len(hidden_ND)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return _score(model.eval(), heldout, weight_VD)


def _hidden(model: Any, data: Hidden, index: int) -> Tensor:
    ids_1L = torch.from_numpy(data.input_ids[index].astype(np.int64))[None]
    rows_N = torch.from_numpy(np.flatnonzero(data.loss_mask[index]) - 1)
    states: Tensor = model.base_model(ids_1L, use_cache=False).last_hidden_state
    return states[0].index_select(0, rows_N)


_Loss = Callable[[Tensor, Tensor, np.ndarray], Tensor]


def _loss(
    target: str,
    temperature: float,
    train: Hidden,
    weight_VD: Tensor,
    other: tuple[Peer, Loss] | None,
) -> _Loss:
    """Return the summed loss of the supervised tokens of some sequences: T^2 KL, as in training.

    `other` is another project's target: stored and read back by its code at every step.
    """
    starts = np.cumsum([0, *train.counts_S])
    if target == "sampled":
        cached = through_the_cache(train, weight_VD, SCHEMES[temperature])
        step = SCHEMES[temperature].quantisation.sampled_step
        loss = LossSpec(
            temperature, alpha=1.0, tail="auto", sampled_log_step=step, rule_highest=temperature
        )
        spec = FusedSpec(loss, chunk_rows=512)

        def sampled(hidden_ND: Tensor, head_VD: Tensor, chosen: np.ndarray) -> Tensor:
            batch = collate([cached.rows[i] for i in chosen], temperature=temperature)
            targets = head_targets(batch)
            return fused_head_loss(hidden_ND, head_VD, None, targets, spec=spec).loss

        return sampled

    def dense(hidden_ND: Tensor, head_VD: Tensor, chosen: np.ndarray) -> Tensor:
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])
        teacher_RV = torch.from_numpy(train.teacher_ND[rows]).float() @ weight_VD.t()
        student_RV = hidden_ND @ head_VD.t()
        with torch.no_grad():
            if other is None:
                gradient_RV = torch.softmax(student_RV / temperature, -1)
                gradient_RV -= torch.softmax(teacher_RV / temperature, -1)
            else:
                peer, loss = other
                stored = peer.store(teacher_RV)
                gradient_RV = loss.gradient(stored, student_RV.detach(), temperature)
        # The gradient of T^2 KL on the logits is T (q - p); its product with them has just that.
        return temperature * (gradient_RV * student_RV).sum()

    return dense


@torch.no_grad()
def _score(model: Any, data: Hidden, weight_VD: Tensor) -> list[float]:
    starts, scores = np.cumsum([0, *data.counts_S]), []
    head_VD = model.get_output_embeddings().weight
    for index in range(len(data.input_ids)):
        teacher_ND = torch.from_numpy(data.teacher_ND[starts[index] : starts[index + 1]]).float()
        log_p_RV = torch.log_softmax(teacher_ND @ weight_VD.t(), -1)
        log_q_RV = torch.log_softmax(_hidden(model, data, index) @ head_VD.t(), -1)
        kl_N = (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(-1)
        scores.append(float(kl_N.mean()))
    return scores


def main() -> None:
    """Run what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=120, help="sequences to train on")
    parser.add_argument("--per_step", type=int, default=4, help="sequences of a step")
    parser.add_argument("--heldout", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65_536,
                        help="read of the corpus; fewer for a short trial")  # fmt: skip
    parser.add_argument("--temperature", type=float, nargs="*", default=[1.0, 2.0])
    parser.add_argument("--target", nargs="*", default=None,
                        help="train these alone, by the names of the table, which needs `dense`; "
                             "bench-fidelity's caption has other projects' names")  # fmt: skip
    add_peer_option(parser)
    arguments = parser.parse_args()
    checkouts = parse(arguments.peer, PROJECTS)
    train, heldout = split(hidden_states(arguments.tokens), arguments.train, arguments.heldout)
    peers = [truncated(64), *peers_of(checkouts, len(train.weight_VD))]
    others = rows_of(peers)
    targets = _targets(arguments.target, others)
    RESULTS.mkdir(parents=True, exist_ok=True)
    results: dict[tuple[str, float, int], list[float]] = {}
    # A result of another commit of a project is another result; without a commit none is kept.
    run_by = "-".join(checkout.commit.split()[1][:8] for checkout in checkouts.values())
    is_known = all(checkout.is_clean for checkout in checkouts.values())
    for seed in range(arguments.seeds):
        for temperature in arguments.temperature:
            for target in targets:
                sizes = f"{arguments.train}-{arguments.per_step}-{arguments.heldout}"
                name = f"{target}-{temperature:g}-{seed}-{sizes}"
                is_theirs = target not in (*OURS, TRUNCATED) and bool(run_by)
                if is_theirs:
                    name += f"-{run_by}"
                file = RESULTS / f"{name.replace(' ', '_')}.json"
                if not file.exists() or (is_theirs and not is_known):
                    scores = run(
                        target, temperature, seed, arguments.per_step, train, heldout, others
                    )
                    partial = file.with_suffix(".partial")
                    partial.write_text(json.dumps(scores))
                    partial.rename(file)
                    print(f"{name}: {np.mean(scores):.4f}", flush=True)
                results[target, temperature, seed] = json.loads(file.read_text())
    if "dense" in targets:
        _table(results, targets, arguments.temperature, arguments.seeds)
    run_now = [peer for name, (peer, _) in others.items() if name in targets]
    print(caption(checkouts, run_now))


def _targets(asked: list[str] | None, others: Targets) -> list[str]:
    """Return the targets to train with.

    Raises:
        ConfigError: one of those asked for is none.
    """
    known = [*OURS, *others]
    if asked is None:
        beside = [name for name in known if name.removesuffix(", rebuilt") in PEERS]
        return [*OURS, TRUNCATED, *beside]
    for name in asked:
        if name not in known:
            raise ConfigError(
                f"--target {name} is no target",
                expected=f"one of: {'; '.join(known)}",
                do=did_you_mean(name, known) or "use one of these names",
            )
    return asked


def _table(
    results: dict[tuple[str, float, int], list[float]],
    targets: list[str],
    temperatures: list[float],
    seeds: int,
) -> None:
    print(f"held-out KL to the teacher at T = 1, nats; mean of {seeds} seeds")
    print(f"{'T':>4} {'target':<32} {'KL':>8} {'+-':>7} {'over dense':>11} {'by rows +-':>11} "
          f"{'by seeds +-':>12}")  # fmt: skip
    worst = 0.0
    for temperature in temperatures:
        base = np.array([results["dense", temperature, seed] for seed in range(seeds)])
        for target in targets:
            scores = np.array([results[target, temperature, seed] for seed in range(seeds)])
            error = scores.mean(0).std(ddof=1) / math.sqrt(scores.shape[1])
            gap = scores - base
            rows = gap.mean(0).std(ddof=1) / math.sqrt(scores.shape[1])
            by_seed = gap.mean(1).std(ddof=1) / math.sqrt(seeds) if seeds > 1 else math.nan
            print(
                f"{temperature:4g} {target:<32} {scores.mean():8.4f} {error:7.4f} "
                f"{gap.mean():+11.4f} {rows:11.4f} {by_seed:12.4f}"
            )
            if target == "sampled":
                worst = max(worst, gap.mean() / error)
    if "sampled" in targets:
        print(f"FIGURE kl_gap_to_dense_in_standard_errors {worst:.3f}")


if __name__ == "__main__":
    sys.exit(run_command(main))
