"""Packed rows are as good as rows alone: same loss, same gradients, in five families of models.

Nothing separates the rows of a pack but position ids that restart; each family's sliding window is
shorter than a pack and than most rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.collate import Batch, collate
from pipeline.loss.head import install_distill_head
from pipeline.loss.settings import LossSettings
from pipeline.student.build.model import load_student
from pipeline.student.training.module import StudentModule

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
WINDOW = 3


def config_of(family: str) -> Any:
    import transformers as hf

    common: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "head_dim": 8,
    }  # fmt: skip
    kinds = ["full_attention", "sliding_attention"] * 2
    window: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": kinds}
    if family == "llama":
        return hf.LlamaConfig(**common)
    if family == "mistral":
        return hf.MistralConfig(**common, sliding_window=WINDOW)
    if family == "gemma3":
        return hf.Gemma3TextConfig(**common, **window, query_pre_attn_scalar=8)
    kind = hf.Qwen2Config if family == "qwen2" else hf.Qwen3Config
    return kind(**common, **window, use_sliding_window=True)


@pytest.fixture(params=FAMILIES)
def student(request: pytest.FixtureRequest, tmp_path: Path) -> StudentModule:
    """Return a random student, loaded as stage two loads it."""
    import transformers as hf

    torch.manual_seed(0)
    model: Any = hf.AutoModelForCausalLM.from_config(config_of(request.param))
    model.save_pretrained(tmp_path)
    model = load_student(tmp_path, dtype="float32")
    install_distill_head(model, LossSettings(temperature=2.0), valid_vocab=64)
    return StudentModule(model)


@pytest.fixture
def rows(make_source: Callable[..., Any]) -> list[Any]:
    rows: list[Any] = make_source([9], longest=14, seed=2).rows[0]
    lengths = [len(row.input_ids_L) for row in rows]
    assert sum(length > 2 * WINDOW for length in lengths) >= 4
    return rows


def loss_of(student: StudentModule, batch: Batch) -> torch.Tensor:
    loss, _ = student(
        batch.input_ids_1T, batch.position_ids_1T, batch.lengths, batch.label_index_N, batch.ids_NK,
        batch.logprobs_NK, batch.inclusion_NK, batch.log_z_N, batch.entropy_N, batch.label_ids_N,
        1.0,
    )  # fmt: skip
    return loss


def loss_and_gradients(
    student: StudentModule, batches: list[Batch]
) -> tuple[float, dict[str, torch.Tensor]]:
    student.zero_grad()
    total = 0.0
    for batch in batches:
        loss = loss_of(student, batch)
        loss.backward()
        total += float(loss.detach())
    return total, {
        name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None
    }


def test_packed_equals_alone(student: StudentModule, rows: list[Any]) -> None:
    packed, ours = loss_and_gradients(student, [collate(rows, temperature=2.0)])
    alone = [collate([row], temperature=2.0) for row in rows if row.loss_mask_L.any()]
    apart, theirs = loss_and_gradients(student, alone)
    assert packed == pytest.approx(apart, rel=2e-6)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    for name, gradient in ours.items():
        scale = float(theirs[name].abs().max())
        torch.testing.assert_close(
            gradient, theirs[name], rtol=1e-4, atol=6e-6 * scale + 1e-9, msg=name
        )


def test_alone_is_one_pass_after_the_other(student: StudentModule, rows: list[Any]) -> None:
    batch = collate(rows, temperature=2.0)
    packed, ours = loss_and_gradients(student, [batch])
    student.body.way = "alone"
    passes: list[int] = []
    hook = student.body.body.register_forward_pre_hook(
        lambda _module, _args, given: passes.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    alone, theirs = loss_and_gradients(student, [batch])
    hook.remove()
    assert passes == [len(row.input_ids_L) for row in rows] == list(batch.lengths)
    assert alone == pytest.approx(packed, rel=2e-6)
    for name, gradient in ours.items():
        scale = float(theirs[name].abs().max())
        torch.testing.assert_close(
            gradient, theirs[name], rtol=1e-4, atol=6e-6 * scale + 1e-9, msg=name
        )


def test_the_order_of_rows_in_a_pack_does_not_matter(
    student: StudentModule, rows: list[Any]
) -> None:
    forward = float(loss_of(student, collate(rows, temperature=2.0)).detach())
    backward = float(loss_of(student, collate(rows[::-1], temperature=2.0)).detach())
    assert forward == pytest.approx(backward, rel=2e-6)


@pytest.mark.parametrize("mistake", ["use_cache", "mask", "positions"])
def test_what_would_let_rows_see_each_other(
    student: StudentModule, rows: list[Any], mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three ways in which transformers silently joins the rows; ours takes none of them."""
    batch = collate(rows, temperature=2.0)
    right = float(loss_of(student, batch).detach())
    body, real = student.model.base_model, student.model.base_model.forward

    def forward(**options: Any) -> Any:
        assert options["use_cache"] is False
        assert "attention_mask" not in options
        if mistake == "use_cache":
            options["use_cache"] = True
        elif mistake == "mask":
            options["attention_mask"] = torch.ones_like(batch.input_ids_1T)
        else:
            del options["position_ids"]
        return real(**options)

    monkeypatch.setattr(body, "forward", forward)
    assert float(loss_of(student, batch).detach()) != pytest.approx(right, rel=1e-4)
