"""The lines that an export's card shows train a student from it, with the project's own loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import Cache, open_cache
from pipeline.data.collate import collate
from pipeline.loss.reference import sparse_divergence
from pipeline.loss.sampled_divergence import dither_bias
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
CACHES = {
    "top_k": "cache-v1-top-k",
    "top_k_sampled": "cache-v1-top-k-sampled",
    "threshold": "cache-v1-threshold",
    "threshold of three temperatures": "cache-v1-threshold-of-three",
}


@pytest.fixture(params=CACHES.values(), ids=CACHES.keys())
def cache(request: pytest.FixtureRequest) -> Cache:
    return open_cache(str(GOLDEN / request.param))


@pytest.fixture
def exported(cache: Cache, tmp_path: Path) -> Path:
    assert main(["export", cache.store.url, str(tmp_path / "plain")]) == 0
    return tmp_path / "plain"


def _lines(folder: Path) -> str:
    """Return the code of the card."""
    (code,) = re.findall(r"```python\n(.+?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 45
    return str(code)


def _offline_datasets(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
    datasets.disable_progress_bars()


def _targets(cache: Cache, temperature: float) -> tuple[list[Any], list[HeadTargets]]:
    source = cache.source("train")
    rows = [r for s, n in enumerate(source.shard_rows()) for r in source.read_rows(s, range(n))]
    found = []
    for row in rows:
        batch = collate([row], temperature=temperature)
        found.append(
            HeadTargets(
                ids_NK=batch.ids_NK, logprobs_NK=batch.logprobs_NK, inclusion_NK=batch.inclusion_NK,
                log_z_N=batch.log_z_N, entropy_N=batch.entropy_N, label_N=batch.label_ids_N,
            )
        )  # fmt: skip
    return rows, found


def _own_loss(
    logits_NV: Tensor, targets: HeadTargets, cache: Cache, temperature: float
) -> tuple[Tensor, float]:
    """Return the project's loss, and by how much its value is less through a known constant."""
    rule = cache.rule
    step = cache.spec.quantisation.sampled_step if rule else 0.0
    spec = LossSpec(
        temperature, 1.0, tail="zero" if rule else "bucket", sampled_log_step=step,
        rule_highest=rule.highest if rule else 0.0,
    )  # fmt: skip
    value = temperature**2 * sparse_divergence(logits_NV, targets, spec).sum()
    if targets.inclusion_NK is None:
        return value, 0.0
    log_bias, value_bias = dither_bias(step, temperature)
    p_NK = (targets.logprobs_NK.double() / temperature - targets.log_z_N.double()[:, None]).exp()
    weight_NK = p_NK * np.exp(-log_bias) / targets.inclusion_NK * (targets.inclusion_NK < 1)
    return value, float(temperature**2 * value_bias * weight_NK.sum())


def test_the_cards_lines_compute_the_projects_loss(
    cache: Cache, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, value and gradient, at every temperature of the cache."""
    _offline_datasets(monkeypatch, tmp_path)
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=cache.spec.vocab_size, hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "student")
    before = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "student").state_dict()
    code = _lines(exported)
    assert "PATH_OF_THIS_FOLDER" in code
    code = code.replace("PATH_OF_THIS_FOLDER", str(exported))
    space: dict[str, Any] = {}
    exec(code.replace("YOUR_STUDENT", str(tmp_path / "student")), space)
    changed = [k for k, v in space["student"].state_dict().items() if not v.equal(before[k])]
    assert changed, "the loop trains"
    assert all(v.isfinite().all() for v in space["student"].state_dict().values())

    generator = torch.Generator().manual_seed(1)
    rows = list(space["load_dataset"](str(exported), split="train"))
    for temperature in cache.manifest.temperatures:
        cached, targets = _targets(cache, temperature)
        assert [row["sample_id"] for row in rows] == [row.sample_id for row in cached]
        for row, target in zip(rows, targets, strict=True):
            if not row["positions"]:
                continue
            shape = (len(row["input_ids"]), cache.spec.vocab_size)
            logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
            own, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            places = torch.tensor(row["positions"]) - 1
            wanted, constant = _own_loss(own[places], target, cache, temperature)
            wanted.backward()
            loss = space["distillation_loss"](theirs, row, temperature)
            loss.backward()
            value = float(wanted.detach()) + constant
            assert float(loss.detach()) == pytest.approx(value, rel=1e-6, abs=1e-6)
            assert own.grad is not None
            torch.testing.assert_close(theirs.grad, own.grad, rtol=1e-5, atol=1e-7)


def test_every_column_is_that_of_the_cache(cache: Cache, exported: Path) -> None:
    for split in ("train", "heldout"):
        source = cache.source(split)
        for shard, count in enumerate(source.shard_rows()):
            plain = pq.read_table(exported / source.shards[shard].path).to_pylist()
            for got, row in zip(plain, source.read_rows(shard, range(count)), strict=True):
                targets = row.targets
                assert got["positions"] == np.flatnonzero(row.loss_mask_L).tolist()
                assert got["log_z"] == targets.log_z_NG.tolist()
                assert got["entropy"] == targets.entropy_NG.tolist()
                assert got["label_logprob"] == targets.label_logprob_N.tolist()
                mass = np.array(
                    [
                        sum(
                            np.exp(log_p)
                            for k, log_p in enumerate(logprobs)
                            if cache.rule is None or got["target_inclusion"][n][k] == 1
                        )
                        for n, logprobs in enumerate(got["target_logprobs"])
                    ]
                )
                np.testing.assert_allclose(
                    got["tail_mass"], np.clip(1 - mass, 0, 1), rtol=1e-5, atol=1e-6
                )
                assert ("target_inclusion" in got) == (cache.rule is not None)


def test_datasets_reads_both_splits_and_transformers_the_tokenizer(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _offline_datasets(monkeypatch, tmp_path)
    from datasets import load_dataset
    from transformers import AutoTokenizer

    assert main(["export", str(tiny_cache), str(tmp_path / "plain"), "--top-k", "4"]) == 0
    found = load_dataset(str(tmp_path / "plain"))
    assert set(found) == {"train", "heldout"}
    assert max(len(ids) for row in found["train"] for ids in row["target_ids"]) == 4
    theirs = AutoTokenizer.from_pretrained(tmp_path / "plain/tokenizer")
    own = AutoTokenizer.from_pretrained(tiny_cache / "_meta/tokenizer")
    ids = found["train"][0]["input_ids"]
    assert theirs.decode(ids) == own.decode(ids)
    card = (tmp_path / "plain/README.md").read_text()
    assert "limited to the 4 largest entries" in card
    assert "python -m pipeline.cache export" in card
