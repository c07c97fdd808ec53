"""The loss that training logs is the one its definition gives, computed here another way.

From the cache's rows in the order of the plan, with the untouched initial student's dense logits
and the fp64 reference: nothing of packing, batching, the fused head, DeepSpeed or the loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.cache.io.reader import open_cache
from pipeline.data.order.plan import TrainPlan
from pipeline.loss.reference import cross_entropy, dense_kl, sparse_divergence
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets
from pipeline.observe.metrics import read_metrics
from tests.conftest import Stage, Tiny

PACKS = 2


def _targets(row: Any, temperature: float) -> HeadTargets:
    """Return the targets of one row, straight from its ragged arrays."""
    targets = row.targets
    size = int(targets.counts_N[0])
    assert (targets.counts_N == size).all(), "top-k keeps equally many everywhere"
    column = targets.temperatures.index(temperature)
    return HeadTargets(
        ids_NK=torch.from_numpy(targets.token_ids_E.reshape(-1, size).astype(np.int64)),
        logprobs_NK=torch.from_numpy(targets.logprobs_E.reshape(-1, size)),
        inclusion_NK=None,
        log_z_N=torch.from_numpy(targets.log_z_NG[:, column].copy()),
        entropy_N=torch.from_numpy(targets.entropy_NG[:, column].copy()),
        label_N=torch.from_numpy(row.input_ids_L[row.loss_mask_L].astype(np.int64)),
    )


def _reference(
    cache_dir: Path, model: Any, vocabulary: int, temperature: float, *, step: int = 0
) -> tuple[Any, Any]:
    """Return mean KL at the temperature and mean cross-entropy over a step's tokens.

    Both carry gradients.
    """
    cache = open_cache(str(cache_dir))
    source = cache.source("train")
    length = int(cache.manifest.identity["corpus"]["max_length"])
    plan = TrainPlan(
        source,
        seed=42,
        packs_per_step=PACKS,
        pack_length=length,
        shuffle_shards=8,
        lanes=64,
        packing=True,
    )
    kd, ce = [], []
    for pack in plan.step(step).packs:
        for row in source.read_rows(pack.shard, pack.rows):
            ids_1L = torch.from_numpy(row.input_ids_L.astype(np.int64))[None]
            logits_LV = model(input_ids=ids_1L).logits[0, :, :vocabulary]
            places: NDArray[np.int64] = np.flatnonzero(row.loss_mask_L) - 1
            targets = _targets(row, temperature)
            logits_NV = logits_LV[torch.from_numpy(places)]
            kd.append(sparse_divergence(logits_NV, targets, LossSpec(temperature, 1.0)))
            ce.append(cross_entropy(logits_NV, targets.label_N))
    return torch.cat(kd).mean(), torch.cat(ce).mean()


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (2.0, 0.5), (2.0, 0.0)])
def test_the_first_logged_loss_is_the_definition(
    temperature: float, alpha: float, tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags = [
        *tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", tmp_path / "student",
        "--temperature", temperature, "--alpha", alpha, "--max_steps", "1",
        "--train.evaluate_before", "false",
    ]  # fmt: skip
    stage("train_student", flags).ok()
    (first, _) = read_metrics(tmp_path / "student/metrics.jsonl")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student/init", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    vocabulary = len(AutoTokenizer.from_pretrained(tiny.teacher))
    assert vocabulary < model.config.vocab_size, "the head is padded, and padding gets no mass"
    kd, ce = _reference(tiny_cache, model, vocabulary, temperature if alpha else 1.0)
    loss = alpha * temperature**2 * kd + (1 - alpha) * ce
    assert first.values["train/loss"] == pytest.approx(loss.item(), rel=2e-5)
    assert first.values["train/cross_entropy"] == pytest.approx(ce.item(), rel=2e-5)
    if alpha:
        assert first.values["train/kl_bucketed"] == pytest.approx(kd.item(), rel=2e-5)
    # What is logged is one thing, what is learned from another: the gradient is the loss's.
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert first.values["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_the_whole_run_is_a_plain_loop_of_torch(
    tiny: Tiny, tiny_cache: Path, tiny_run: Path
) -> None:
    """Twelve steps: losses, norms, rates, and the exported weights."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

    model = AutoModelForCausalLM.from_pretrained(
        tiny_run / "init", dtype=torch.float32, attn_implementation="eager"
    )
    vocabulary = len(AutoTokenizer.from_pretrained(tiny.teacher))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3, betas=(0.9, 0.95),
    )  # fmt: skip
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.1 * 12), 12)
    logged = [
        r.values for r in read_metrics(tiny_run / "metrics.jsonl") if "train/loss" in r.values
    ]
    assert len(logged) == 12
    for step, values in enumerate(logged):
        loss, _ = _reference(tiny_cache, model, vocabulary, 1.0, step=step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert values["train/loss"] == pytest.approx(loss.item(), rel=1e-4), step
        assert values["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-3), step
        assert values["train/learning_rate"] == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for name, weight in load_file(tiny_run / "model/model.safetensors").items():
        torch.testing.assert_close(
            weight, model.get_parameter(name).detach(), rtol=1e-3, atol=1e-4, msg=name
        )


def test_the_cached_entries_give_a_lower_bound_of_the_dense_divergence(
    tiny: Tiny, tiny_cache: Path
) -> None:
    from transformers import AutoModelForCausalLM

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    teacher = load(tiny.teacher)
    source = open_cache(str(tiny_cache)).source("train")
    (row,) = source.read_rows(0, [0])
    ids_1L = torch.from_numpy(row.input_ids_L.astype(np.int64))[None]
    places = torch.from_numpy(np.flatnonzero(row.loss_mask_L) - 1)
    torch.manual_seed(3)
    with torch.no_grad():
        teacher_NV = teacher(input_ids=ids_1L).logits[0, places].double()
    student_NV = teacher_NV + torch.randn_like(teacher_NV)
    for temperature in (1.0, 2.0):
        full_N = dense_kl(student_NV, teacher_NV, temperature=temperature)
        bucket_N = sparse_divergence(
            student_NV, _targets(row, temperature), LossSpec(temperature, 1.0)
        )
        # What the codec rounds moves the value by less than a hundredth.
        assert (bucket_N <= 1.01 * full_N + 1e-3).all()
        assert (bucket_N > -1e-6).all()
