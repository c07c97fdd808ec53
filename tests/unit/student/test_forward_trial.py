"""Whether packing changes a student is found out on the student itself, not by its name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ModelError, ResumeError
from pipeline.student.forward.attention import settle_attention
from pipeline.student.forward.body import decoder_layers, text_body
from pipeline.student.forward.choice import choose_way, read_way, record_way
from pipeline.student.forward.trial import run_packing_trial, trial_lengths, trial_row
from pipeline.student.forward.ways import BodyForward, Way, boundaries
from tests.tiny_families import family_model

RIGHT = ("Llama", "Gemma 3 that sees", "Qwen3-MoE", "DeepSeek V3", "GPT-2")
WRONG = ("Falcon-H1", "LFM2", "RecurrentGemma", "gpt-oss")


def alone(value: Any) -> list[Any]:
    return [value]


def choose(
    model: Any,
    wanted: str = "auto",
    before: Way | None = None,
    gather: Callable[[Any], list[Any]] = alone,
) -> tuple[Way, BodyForward]:
    forward = BodyForward(text_body(model))
    way = choose_way(forward, model, wanted=wanted, before=before, device="cpu", gather=gather)
    assert forward.way == way
    return way, forward


@pytest.mark.parametrize("family", RIGHT)
def test_packed_where_it_is_right(family: str) -> None:
    model = family_model(family)
    trial = run_packing_trial(BodyForward(text_body(model)), model, device="cpu")
    assert trial.right == "boundaries"
    assert all(tried.error < 1e-4 and tried.seen < 1e-4 for tried in trial.tried)


@pytest.mark.parametrize("family", WRONG)
def test_alone_where_packing_lets_neighbours_in(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = family_model(family)
    with caplog.at_level(logging.WARNING, "pipeline"):
        way, forward = choose(model)
    assert way == "alone"
    (warning,) = [record for record in caplog.records if record.name.startswith("pipeline")]
    assert "go through it one at a time, because packed sequences see their neighbours" in (
        warning.getMessage()
    )
    # And this way is right: each sequence as if there were no other.
    ids_1T, positions_1T = trial_row(model, (5, 7), "cpu")
    with torch.no_grad():
        both_TD = forward(ids_1T, positions_1T, (5, 7)).hidden_TD
        second_TD = forward(ids_1T[:, 5:], positions_1T[:, 5:], (7,)).hidden_TD
    torch.testing.assert_close(both_TD[5:], second_TD)


def test_packed_that_is_wrong_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"FalconH1ForCausalLM cannot be packed here: packed seq"):
        choose(family_model("Falcon-H1"), "packed")


def test_chunks_of_attention_are_found_where_rows_are_long_enough() -> None:
    model = family_model("Llama 4")
    assert trial_lengths(model, 40) == (11, 13, 6)
    assert trial_lengths(model, 41) == (33, 13, 6)
    forward = BodyForward(text_body(model))
    assert run_packing_trial(forward, model, device="cpu", longest_row=40).right == "boundaries"
    long = run_packing_trial(forward, model, device="cpu", longest_row=100)
    assert long.right is None
    assert long.best.seen == 0  # other chunks, though no neighbours


def test_in_sixteen_bit_rounding_passes_and_neighbours_do_not() -> None:
    llama = family_model("Qwen3").to(torch.bfloat16)
    assert choose(llama)[0] == "boundaries"
    assert choose(family_model("LFM2").to(torch.bfloat16))[0] == "alone"


def test_ranks_agree_on_the_worst() -> None:
    model = family_model("Llama")
    wrong = run_packing_trial(
        BodyForward(text_body(family_model("LFM2"))), family_model("LFM2"), device="cpu"
    )
    assert choose(model, gather=lambda own: [own, wrong])[0] == "alone"


def test_a_resumed_run_keeps_its_way(tmp_path: Path) -> None:
    assert read_way(tmp_path) is None
    record_way(tmp_path, "alone")
    model = family_model("Llama")
    assert choose(model, before=read_way(tmp_path))[0] == "alone"
    with pytest.raises(ResumeError, match="began with its sequences one at a time"):
        choose(model, "packed", before="alone")
    with pytest.raises(ModelError, match="cannot be packed here"):
        choose(family_model("LFM2"), before="boundaries")
    assert choose(model, before="positions")[0] == "positions"
    (tmp_path / "forward.json").write_text("{}")
    with pytest.raises(ResumeError, match="not readable"):
        read_way(tmp_path)


def test_a_body_that_looks_ahead_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("Llama")
    model.config.is_causal = False
    with pytest.raises(ModelError, match=r"change by .* with a token that comes later"):
        choose(model, "alone")


def test_a_head_that_its_body_does_not_feed_is_refused() -> None:
    model = family_model("Llama")
    model.lm_head.register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
    with pytest.raises(ModelError, match="is not fed the last hidden states of its body"):
        choose(model)


@pytest.mark.parametrize("raised", [IndexError("out of range"), AttributeError(), KeyError("x")])
def test_what_a_models_own_code_raises_is_one_line(raised: Exception) -> None:
    model = family_model("Llama")

    def refuse(*_: object) -> None:
        raise raised

    model.model.layers[1].register_forward_pre_hook(refuse)
    said = rf"LlamaForCausalLM cannot run one .* here \({type(raised).__name__}: "
    with pytest.raises(ModelError, match=said):
        choose(model)
    forward = BodyForward(text_body(model))
    with pytest.raises(ModelError, match=said):
        settle_attention(model, forward, ("sdpa",), device="cpu", gather=lambda own: [own])


def test_a_lost_peer_is_not_the_models_refusal() -> None:
    model = family_model("Llama")

    def lose(*_: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    model.model.layers[1].register_forward_pre_hook(lose)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        choose(model)


def test_the_trial_leaves_no_trace() -> None:
    model = family_model("Llama").train()
    forward = BodyForward(text_body(model), "positions")
    run_packing_trial(forward, model, device="cpu")
    assert model.training
    assert forward.way == "positions"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_boundaries() -> None:
    given = boundaries((2, 1, 3), "cpu")
    assert given["cu_seq_lens_q"].tolist() == [0, 2, 3, 6]
    assert given["cu_seq_lens_q"].dtype == given["seq_idx"].dtype == torch.int32
    assert given["seq_idx"].tolist() == [[0, 0, 1, 2, 2, 2]]
    assert given["max_length_q"] == given["max_length_k"] == 3


def test_the_body_of_a_model_that_sees_is_its_language_model() -> None:
    model = family_model("Gemma 3 that sees")
    assert text_body(model) is model.model.language_model
    assert len(decoder_layers(model)) == 4  # its config has no num_hidden_layers of its own
