"""Arithmetic of the yardsticks: measures, targets, width pruning, steps of training."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from tests.bench.fidelity_data import Hidden
from tests.bench.peers.rebuilt import drawn_renormalised, random_sampling
from tests.bench.yardsticks.__main__ import _arms
from tests.bench.yardsticks.arms import ARMS, BUCKET, DRAWS, Arm, Rules, selected
from tests.bench.yardsticks.copying import copying_scores, random_copies, text_copies
from tests.bench.yardsticks.data import short_texts
from tests.bench.yardsticks.gradients import compare_gradients
from tests.bench.yardsticks.measures import (
    angle,
    bins_of,
    calibration_error,
    estimate,
    gap_closed,
    mean_and_error,
)
from tests.bench.yardsticks.targets import (
    Rows,
    chosen_positions,
    cross_entropy,
    dense,
    from_peer,
    jensen_shannon,
    reverse_kl,
)
from tests.bench.yardsticks.training import TeacherRows, head_gradients, heldout_scores, train
from tests.bench.yardsticks.width import Shape, importance_of, neurons_for, pruned_in_width

VOCABULARY, WIDTH = 200, 24


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rows(rows: int = 5) -> Rows:
    log_p_RV = torch.log_softmax(2 * _normal(0, rows, VOCABULARY), -1)
    label_R = torch.arange(rows) * 7
    return Rows(log_p_RV, 2 * _normal(1, rows, VOCABULARY), label_R, np.arange(rows))


def _llama(**changed: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 8, "tie_word_embeddings": True, "max_position_embeddings": 64,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes | changed)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _hidden(sequences: int = 3, length: int = 9) -> Hidden:
    random = np.random.default_rng(0)
    ids = [random.integers(0, VOCABULARY, length).astype(np.int32) for _ in range(sequences)]
    mask_L = np.arange(length) > 2
    tokens = sequences * (length - 3)
    teacher_ND = random.normal(size=(tokens, WIDTH)).astype(np.float16)
    weight_VD = random.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    label_N = np.concatenate([part[mask_L] for part in ids]).astype(np.int64)
    names = [f"{n:032x}" for n in range(sequences)]
    return Hidden(teacher_ND, teacher_ND, weight_VD, label_N, names, ids, [mask_L] * sequences)


def test_angles_and_shares_of_a_gap() -> None:
    assert angle(0.0, 2.0, 3.0) == pytest.approx(90)
    assert angle(6.0, 2.0, 3.0) == pytest.approx(0)
    assert angle(-6.000001, 2.0, 3.0) == pytest.approx(180), "rounding beyond -1"
    assert angle(math.cos(math.radians(4)), 1.0, 1.0) == pytest.approx(4)
    assert gap_closed(2.81, 2.81, 2.75) == 0
    assert gap_closed(2.81, 2.75, 2.75) == pytest.approx(1)
    assert gap_closed(2.81, 2.87, 2.75) == pytest.approx(-1), "worse than cross-entropy"


def test_calibration_is_confidence_against_accuracy() -> None:
    confidence_N = np.array([0.9, 0.9, 0.3, 0.3, 1.0])
    correct_N = np.array([True, False, False, False, True])
    bins_B3 = bins_of(confidence_N, correct_N, 10)
    assert bins_B3[:, 0].sum() == 5
    # 0.9 twice and 1.0 share the last bin: |2.8 - 2|; 0.3 twice: |0.6 - 0|.
    assert calibration_error(bins_B3) == pytest.approx((0.8 + 0.6) / 5)
    apart = np.stack([bins_of(confidence_N[:2], correct_N[:2], 10),
                      bins_of(confidence_N[2:], correct_N[2:], 10)])  # fmt: skip
    assert calibration_error(apart) == pytest.approx((0.8 + 0.6) / 5), "rows are pooled"


def test_errors_of_a_mean_are_the_usual_ones() -> None:
    table_SR = np.random.default_rng(0).normal(size=(3, 20))
    found = estimate(lambda row_R: float(row_R.mean()), table_SR)
    assert found.value == pytest.approx(table_SR.mean())
    usual = table_SR.mean(0).std(ddof=1) / math.sqrt(20)
    assert found.by_rows == pytest.approx(usual)
    assert found.by_seeds == pytest.approx(table_SR.mean(1).std(ddof=1) / math.sqrt(3))
    assert math.isnan(estimate(lambda row_R: float(row_R.mean()), table_SR[:1]).by_seeds)
    assert mean_and_error([1.0, 3.0]) == pytest.approx((2.0, 1.0))


def test_gradients_at_the_logits_are_those_of_their_divergences() -> None:
    rows = _rows()
    p_RV = rows.log_p_RV.exp()

    def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
        return (log_a.exp() * (log_a - log_b)).sum()

    divergences = {
        dense: lambda log_q: kl(rows.log_p_RV, log_q),
        cross_entropy: lambda log_q: -log_q.gather(1, rows.label_R[:, None]).sum(),
        reverse_kl: lambda log_q: kl(log_q, rows.log_p_RV),
        jensen_shannon: lambda log_q: sum(
            kl(part, ((log_q.exp() + p_RV) / 2).log()) / 2 for part in (rows.log_p_RV, log_q)
        ),
    }
    for rule, divergence in divergences.items():
        logits_RV = rows.logits_RV.clone().requires_grad_()
        (expected,) = torch.autograd.grad(divergence(torch.log_softmax(logits_RV, -1)), logits_RV)
        before = rows.log_p_RV.clone(), rows.logits_RV.clone()
        torch.testing.assert_close(rule(rows), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(rows.log_p_RV, before[0]), "the teacher's rows are used again"
        assert torch.equal(rows.logits_RV, before[1])


def test_draws_depend_on_the_seed_and_are_right_on_average() -> None:
    rows = _rows()
    exact = dense(rows)
    some = [from_peer(random_sampling(12, seed=seed))(rows) for seed in range(300)]
    assert not torch.equal(some[0], some[1])
    assert torch.equal(some[1], from_peer(random_sampling(12, seed=1))(rows))
    mean = torch.stack(some).mean(0)
    assert float((mean - exact).norm() / exact.norm()) < 0.1
    target_RV = torch.softmax(rows.logits_RV, -1) - some[0]
    torch.testing.assert_close(target_RV.sum(-1), torch.ones(5))
    torch.testing.assert_close(12 * target_RV, (12 * target_RV).round(), rtol=0, atol=1e-4)


def test_draws_renormalised_keep_the_teachers_ratios() -> None:
    rows = _rows()
    target_RV = torch.softmax(rows.logits_RV, -1) - from_peer(drawn_renormalised(256))(rows)
    for target_V, log_p_V in zip(target_RV, rows.log_p_RV, strict=True):
        kept = target_V > 1e-6
        assert 10 < int(kept.sum()) < VOCABULARY
        torch.testing.assert_close(
            target_V[kept], torch.softmax(log_p_V[kept], -1), rtol=1e-3, atol=1e-6
        )


def test_positions_of_the_highest_scores_in_their_order() -> None:
    score_N = torch.tensor([0.1, 5.0, 0.2, 4.0, 0.3, 0.0])
    assert chosen_positions(score_N, 0.2).tolist() == [1, 3], "two: a fifth of six, rounded up"
    assert chosen_positions(score_N, 0.01).tolist() == [1]
    assert chosen_positions(score_N, 1.0).tolist() == list(range(6))
    random = np.random.default_rng(0)
    for select, expected in (("student", [1, 3]), ("teacher", [2, 4])):
        choose = selected(Arm("", 2, select=select))  # type: ignore[arg-type]
        assert choose is not None
        assert choose(score_N, torch.tensor([0.0, 0, 1, 0, 1, 0]), random).tolist() == expected
    choose = selected(Arm("", 2, select="random"))
    assert choose is not None
    assert len({tuple(choose(score_N, score_N, random).tolist()) for _ in range(20)}) > 1


def test_width_pruning_changes_nothing_where_nothing_is_cut() -> None:
    model, data = _llama(), _hidden()
    importance = importance_of(model, data.input_ids)
    same = pruned_in_width(model, importance, Shape(WIDTH, 6, 40))
    ids = torch.from_numpy(data.input_ids[0].astype(np.int64))[None]
    torch.testing.assert_close(same(ids).logits, model(ids).logits)


def test_width_pruning_leaves_out_what_is_never_active() -> None:
    model, data = _llama(), _hidden()
    ids = torch.from_numpy(data.input_ids[0].astype(np.int64))[None]
    dead = {0: [3, 17], 1: [0, 39]}
    with torch.no_grad():
        for layer, neurons in dead.items():
            model.model.layers[layer].mlp.gate_proj.weight[neurons] = 0
            attention = model.model.layers[layer].self_attn
            # Query heads 1 and 5, one of each group: their values are what no query can change, so
            # the head is silenced where it is read and its importance set low by hand below.
            attention.o_proj.weight[:, 8:16] = 0
            attention.o_proj.weight[:, 40:48] = 0
    importance = importance_of(model, data.input_ids)
    assert (importance.neurons_LF[0][dead[0]] == 0).all()
    importance.heads_LH[:, [1, 5]] = 0
    pruned = pruned_in_width(model, importance, Shape(WIDTH, 4, 38))
    torch.testing.assert_close(pruned(ids).logits, model(ids).logits)
    assert pruned.model.layers[0].mlp.up_proj.weight.shape == (38, WIDTH)


def test_channels_of_small_activations_are_cut() -> None:
    model, data = _llama(), _hidden()
    importance = importance_of(model, data.input_ids)
    importance.channels_D[[0, 5]] = 0
    pruned = pruned_in_width(model, importance, Shape(WIDTH - 2, 6, 40))
    kept = [channel for channel in range(WIDTH) if channel not in (0, 5)]
    expected = model.model.embed_tokens.weight[:, kept]
    assert torch.equal(pruned.model.embed_tokens.weight, expected)
    assert torch.equal(pruned.lm_head.weight, expected)
    assert pruned(torch.arange(5)[None]).logits.isfinite().all()


def test_neurons_bring_a_model_to_its_parameters() -> None:
    model = _llama()
    own = sum(parameter.numel() for parameter in model.parameters())
    assert neurons_for(own, model.config, WIDTH, 6) == 40
    narrow = pruned_in_width(
        model, importance_of(model, _hidden().input_ids),
        Shape(16, 4, neurons_for(8000, model.config, 16, 4, step=1)),
    )  # fmt: skip
    found = sum(parameter.numel() for parameter in narrow.parameters())
    assert found == pytest.approx(8000, abs=3 * 16 * 2 / 2 + 1)


def _mean_kl(model: Any, data: Hidden, chosen: list[int]) -> torch.Tensor:
    """Return the mean KL over the supervised tokens of sequences, by autograd through the head."""
    total, count = torch.zeros(()), 0
    for index in chosen:
        ids = torch.from_numpy(data.input_ids[index].astype(np.int64))[None]
        places = torch.from_numpy(np.flatnonzero(data.loss_mask[index]) - 1)
        first = index * len(places)
        teacher_ND = torch.from_numpy(data.teacher_ND[first : first + len(places)]).float()
        log_p = torch.log_softmax(teacher_ND @ torch.from_numpy(data.weight_VD).t(), -1)
        log_q = torch.log_softmax(model(ids).logits[0, places], -1)
        total, count = total + (log_p.exp() * (log_p - log_q)).sum(), count + len(places)
    return total / count


@pytest.mark.parametrize("learn_head", [False, True])
def test_a_step_is_that_of_autograd(learn_head: bool) -> None:
    model, other, data = _llama(), _llama(), _hidden()
    train(
        model, TeacherRows.of(data), dense, seed=0, per_step=3, learn_head=learn_head,
        learning_rate=1e-2,
    )  # fmt: skip
    other.model.embed_tokens.weight.requires_grad_(learn_head)
    parameters = [parameter for parameter in other.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)
    other.train()
    _mean_kl(other, data, [0, 1, 2]).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        # Adam's first step is the gradient's sign: where that is near 0 the two may differ.
        assert float(((ours - theirs).abs() < 1e-4).float().mean()) > 0.99


def test_only_selected_tokens_count() -> None:
    data = _hidden(sequences=1)
    teacher, head_VD = TeacherRows.of(data), torch.from_numpy(data.weight_VD)
    states = [_normal(3, 6, WIDTH)]
    choose = selected(Arm("", 2, select="teacher"))
    (found_ND,), _ = head_gradients(
        states, head_VD, teacher, [0], dense, choose, np.random.default_rng(0)
    )
    places = chosen_positions(teacher.entropy_N, 0.2)
    (all_ND,), _ = head_gradients(states, head_VD, teacher, [0], dense)
    expected_ND = torch.zeros_like(all_ND)
    expected_ND[places] = all_ND[places] * 6 / len(places)
    torch.testing.assert_close(found_ND, expected_ND)


def test_scores_of_a_student_that_is_the_teacher() -> None:
    model, data = _llama(), _hidden()
    with torch.no_grad():
        states = [
            model.model(torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0, 2:-1]
            for ids in data.input_ids
        ]
    weight_VD = model.lm_head.weight.detach().numpy()
    teacher_ND = torch.cat(states).numpy()
    same = Hidden(teacher_ND, teacher_ND, weight_VD, data.label_N, data.sample_ids,
                  data.input_ids, data.loss_mask)  # fmt: skip
    found = heldout_scores(model, TeacherRows.of(same))
    assert found.kl == pytest.approx([0.0] * 3, abs=1e-5)
    assert np.array(found.bins)[:, :, 0].sum() == 18
    log_q = torch.log_softmax(torch.from_numpy(teacher_ND) @ torch.from_numpy(weight_VD).t(), -1)
    expected = -log_q[torch.arange(18), torch.from_numpy(data.label_N)].reshape(3, 6).mean(1)
    assert found.loss == pytest.approx(expected.tolist(), rel=1e-4)


def test_gradients_are_compared_as_vectors_of_the_body() -> None:
    model, data = _llama(), _hidden(sequences=4)
    rules = {"same": dense, "twice": lambda rows: 2 * dense(rows), "other": cross_entropy}
    found = compare_gradients(model, TeacherRows.of(data), rules, per_step=2, steps=2)
    assert found["same"].angle == pytest.approx(0, abs=0.1)
    assert found["twice"].ratio == pytest.approx(2)
    assert found["twice"].angles == pytest.approx([0, 0], abs=0.1)
    assert found["other"].angle > 10
    assert len(found["other"].ratios) == 2


def test_the_projects_targets_come_back_from_its_cache() -> None:
    teacher = TeacherRows.of(_hidden())
    rules = Rules(teacher)
    tokens_R = np.arange(6, 12)
    logits_RV = _normal(5, 6, VOCABULARY)
    rows = Rows(teacher.log_p_NV[6:12], logits_RV, torch.arange(6), tokens_R)
    ids_RK = rows.log_p_RV.topk(64).indices
    found_RK = rules.of(BUCKET, 0)(rows).gather(1, ids_RK)
    exact_RK = dense(rows).gather(1, ids_RK)
    assert float((found_RK - exact_RK).norm() / exact_RK.norm()) < 0.02  # log-probs are rounded
    assert rules.entries(BUCKET) == 64
    assert rules.entries("top-12 truncated") == 12
    assert 1 < rules.entries(DRAWS[0]) < 12


def test_copies_stand_twice_and_a_copier_is_told() -> None:
    ids_ST = random_copies(3, 8, 500)
    assert ids_ST.shape == (3, 17)
    assert (ids_ST[:, 1:9] == ids_ST[:, 9:]).all()
    assert (text_copies(5, 4, [np.arange(10, dtype=np.int32), np.arange(2, dtype=np.int32)])
            == [[0, 3, 4, 5, 6, 3, 4, 5, 6]]).all()  # fmt: skip

    def states(ids_1T: torch.Tensor, *, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        known_T = torch.zeros(17, dtype=torch.int64)
        known_T[9:16] = ids_1T[0, 10:17]  # the second copy's next tokens, from its second on
        scores_TV = 20 * torch.nn.functional.one_hot(known_T, 500).float()
        return SimpleNamespace(last_hidden_state=scores_TV[None])

    head = SimpleNamespace(weight=torch.eye(500))
    copier = SimpleNamespace(base_model=states, get_output_embeddings=lambda: head)
    found = copying_scores(copier, ids_ST)
    assert found.accuracy_S == [1.0] * 3
    assert min(found.gain_S) > 15


def test_texts_are_cut_and_those_of_mostly_questions_left_out() -> None:
    ids_L = np.arange(10, dtype=np.int32)
    samples = [
        SimpleNamespace(sample_id=name, input_ids=ids_L, loss_mask=ids_L >= first)
        for name, first in (("text", 1), ("chat", 3), ("question", 4))
    ]
    data = short_texts(samples, 6, np.zeros((VOCABULARY, WIDTH), np.float32))
    assert data.sample_ids == ["text", "chat"]
    assert data.counts_S == [5, 3]
    assert data.label_N.tolist() == [1, 2, 3, 4, 5, 3, 4, 5]
    assert [part.tolist() for part in data.input_ids] == [list(range(6))] * 2


def test_an_arm_that_is_none_is_told() -> None:
    assert _arms(None) == [arm.name for arm in ARMS]
    assert len(set(_arms(None))) == len(ARMS)
    with pytest.raises(ConfigError, match="did you mean reverse KL"):
        _arms(["dense", "reverse kl"])
