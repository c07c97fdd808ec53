"""Attention by choice: what a machine lacks, what a model refuses, and torch's varlen_attn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError, DistillError, ModelError
from pipeline.student.build.model import load_student
from pipeline.student.forward.attention import (
    attention_order,
    fit_attention,
    make_known,
    require_attention,
    settle_attention,
)
from pipeline.student.forward.body import text_body
from pipeline.student.forward.trial import trial_row
from pipeline.student.forward.ways import BodyForward
from pipeline.student.settings.student import StudentSettings
from tests.tiny_families import family_model

ORDER = ("torch_varlen", "sdpa", "eager")
LENGTHS = (9, 1, 14)


def stand_in(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
    max_q: int, max_k: int, *, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """varlen_attn as its documentation has it, a sequence and a matrix at a time."""
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    repeats = query_THD.shape[1] // key_TGD.shape[1]
    assert enable_gqa == (repeats > 1)
    outputs = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_k[1:].tolist(), strict=True):
        query_HLD = query_THD[start:end].transpose(0, 1)
        key_HLD = key_TGD[start:end].transpose(0, 1).repeat_interleave(repeats, 0)
        value_HLD = value_TGD[start:end].transpose(0, 1).repeat_interleave(repeats, 0)
        behind_LL = torch.arange(end - start)[:, None] - torch.arange(end - start)
        left, right = window_size
        seen_LL = (behind_LL <= left) | (left < 0)
        seen_LL &= (behind_LL >= -right) | (right < 0)
        width = query_THD.shape[-1]
        scores_HLL = query_HLD @ key_HLD.transpose(1, 2) * (scale or width**-0.5)
        weights_HLL = scores_HLL.masked_fill(~seen_LL, -torch.inf).softmax(-1)
        outputs.append((weights_HLL @ value_HLD).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the adapter compute in float32 on the CPU."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    monkeypatch.setattr("pipeline.student.forward.varlen._TYPES", (torch.float32,))
    make_known(ORDER)


def hidden(model: Any, attention: str, way: Any = "boundaries") -> Tensor:
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return BodyForward(text_body(model), way)(
            *trial_row(model, LENGTHS, "cpu"), LENGTHS
        ).hidden_TD


@pytest.mark.parametrize(
    "family",
    ["Llama", "Qwen2", "Mistral", "Gemma 3", "Gemma 3 that sees", "OLMo 3", "Phi-3", "DeepSeek V3"],
)
@pytest.mark.parametrize("way", ["boundaries", "alone"])
@pytest.mark.usefixtures("varlen")
def test_varlen_computes_what_eager_does(family: str, way: str) -> None:
    model = family_model(family)
    torch.testing.assert_close(
        hidden(model, "torch_varlen", way), hidden(model, "eager", way), rtol=1e-4, atol=1e-5
    )


@pytest.mark.usefixtures("varlen")
def test_varlen_is_left_where_a_layer_needs_more(caplog: pytest.LogCaptureFixture) -> None:
    model = family_model("Llama")
    model.set_attn_implementation("torch_varlen")
    assert _settled(model) == "torch_varlen"

    sinks = family_model("gpt-oss")
    sinks.set_attn_implementation("torch_varlen")
    with caplog.at_level("INFO", "pipeline"):
        assert _settled(sinks) == "eager"
    assert "GptOssAttention has attention sinks" in caplog.text or "sdpa" in caplog.text


def _settled(model: Any, order: tuple[str, ...] = ORDER) -> str:
    return settle_attention(
        model, BodyForward(text_body(model)), order, device="cpu", gather=lambda own: [own]
    )


def test_a_soft_cap_is_left_to_eager() -> None:
    capped = family_model("Gemma 2", attention="sdpa")
    assert _settled(capped, ("sdpa", "eager")) == "eager"  # by comparison: sdpa leaves it out
    capped.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="differ from eager attention's by"):
        _settled(capped, ("sdpa",))
    capped.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match=r"cannot use sdpa \(its scores have a soft cap of 50"):
        fit_attention(capped, ("sdpa",))
    fit_attention(capped, ("sdpa", "eager"))  # by its config, before weights are there
    assert capped.config._attn_implementation == "eager"


def test_auto_takes_what_the_architecture_serves(tmp_path: Path) -> None:
    family_model("gpt-oss").save_pretrained(tmp_path)
    assert load_student(tmp_path, dtype="float32").config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="does not support an attention"):
        load_student(tmp_path, dtype="float32", attention=("sdpa",))


def test_the_order_of_attentions() -> None:
    assert attention_order("auto", "bfloat16", on_gpu=True) == ORDER
    assert attention_order("auto", "float32", on_gpu=True) == ("sdpa", "eager")
    assert attention_order("auto", "bfloat16", on_gpu=False) == ("sdpa", "eager")
    assert attention_order("flash", "bfloat16", on_gpu=True) == ("flash_attention_2",)


@pytest.mark.parametrize("wanted", ["varlen", "flex", "flash"])
def test_a_machine_without_it(wanted: str) -> None:
    with pytest.raises(ConfigError, match="on a machine without a GPU") as caught:
        require_attention(wanted, "bfloat16", on_gpu=False)
    assert wanted == "flash" or "one that is there: sdpa, eager" in str(caught.value)
    assert "\n" not in str(caught.value).strip()
    with pytest.raises(DistillError, match=r"in float32|without the package"):
        require_attention(wanted, "float32", on_gpu=True)


def test_two_settings_of_one_thing() -> None:
    assert StudentSettings(use_flash_attention=True).chosen_attention == "flash"
    assert StudentSettings(attention="sdpa").chosen_attention == "sdpa"
    with pytest.raises(ValueError, match="found sdpa with use_flash_attention"):
        StudentSettings(use_flash_attention=True, attention="sdpa")


@pytest.mark.parametrize("wanted", ["flash", "flex", "varlen"])
def test_a_forecast_asks_this_machine_for_no_package(wanted: str) -> None:
    require_attention(wanted, "bfloat16", on_gpu=True, elsewhere=True)
    if wanted == "flash":
        with pytest.raises(ConfigError, match="use_flash_attention in float32"):
            require_attention(wanted, "float32", on_gpu=True, elsewhere=True)
