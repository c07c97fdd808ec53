"""Layer reconstruction brings a pruned student nearer to its source, on texts it has not seen."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import ModelError
from pipeline.student.build import reconstruct
from pipeline.student.build.reconstruct import reconstruct_student
from tests.unit.student.tiny_models import VOCAB, tiny_model, without_other_layers

KEPT = (0, 2, 5)


def _sequences(number: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 40, number).tolist()
    return [rng.integers(0, VOCAB, length).astype(np.int32) for length in lengths]


def _compare(student: Any, source: Any, sequences: list[np.ndarray]) -> tuple[float, float]:
    """Return the relative error of the last hidden state before the norm, and KL."""
    error = kl = 0.0
    tokens = 0
    for sequence in sequences:
        ids = torch.from_numpy(sequence.astype(np.int64))[None]
        last: list[Any] = []
        hooks = [
            model.model.layers[-1].register_forward_hook(
                lambda _m, _a, out, last=last: last.append(out[0] if type(out) is tuple else out)
            )
            for model in (student, source)
        ]
        with torch.no_grad():
            q = student(ids, use_cache=False).logits.log_softmax(-1)
            p = source(ids, use_cache=False).logits.log_softmax(-1)
        for hook in hooks:
            hook.remove()
        own, wanted = last
        error += float(((own - wanted).square().sum(-1) / wanted.square().sum(-1)).sum())
        kl += float((p.exp() * (p - q)).sum())
        tokens += len(sequence)
    return error / tokens, kl / tokens


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def source(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param, spread=0.15)


@pytest.fixture
def student(source: Any) -> Any:
    return without_other_layers(copy.deepcopy(source), KEPT)


def test_hidden_states_and_kl_come_nearer(source: Any, student: Any) -> None:
    unseen = _sequences(20, seed=1)
    error, kl = _compare(student, source, unseen)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    frozen = {name: value.clone() for name, value in source.state_dict().items()}
    reconstruct_student(student, source, KEPT, _sequences(200, seed=0))
    error_after, kl_after = _compare(student, source, unseen)
    assert error_after < 0.8 * error
    assert kl_after < 0.9 * kl
    changed = {n for n, value in student.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(len(KEPT))}
    for name, value in source.state_dict().items():
        assert torch.equal(value, frozen[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert not any(m._forward_hooks for m in source.modules())


def test_padding_counts_for_nothing(source: Any) -> None:
    sequences = _sequences(40, seed=2)
    results = []
    for order in (sequences, sequences[::-1]):
        student = without_other_layers(copy.deepcopy(source), KEPT)
        reconstruct_student(student, source, KEPT, order)
        results.append(student.model.layers[0].mlp.down_proj.weight.detach())
    assert torch.allclose(*results, atol=1e-5)
    # One by one, nothing is padded at all.
    student = without_other_layers(copy.deepcopy(source), KEPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.student.build.reconstruct._BATCH_SEQUENCES", 1)
        reconstruct_student(student, source, KEPT, sequences)
    alone = student.model.layers[0].mlp.down_proj.weight.detach()
    assert torch.allclose(results[0], alone, atol=1e-4)


def test_an_unpruned_student_is_left_as_it_is(source: Any) -> None:
    student = copy.deepcopy(source)
    reconstruct_student(student, source, tuple(range(6)), _sequences(20, seed=3))
    for name, value in student.state_dict().items():
        assert torch.allclose(value, source.state_dict()[name], atol=1e-5), name


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "glm4", "granite"])
def test_other_architectures_are_refused(family: str) -> None:
    model = tiny_model(family)
    student = without_other_layers(copy.deepcopy(model), KEPT)
    with pytest.raises(ModelError, match=r"student.reconstruct on .* --student.reconstruct none"):
        reconstruct_student(student, model, KEPT, _sequences(5, seed=4))


def test_a_token_of_huge_norm_does_not_decide_the_fit() -> None:
    # The first token of a sequence can be hundreds of times as long as the others. Here it asks
    # for W = -1 and 200 ordinary tokens ask for W = +1.
    torch.manual_seed(0)
    inputs = torch.randn(200, 1)
    ordinary = (inputs, inputs.clone(), torch.ones(200, 1))
    huge = (torch.full((1, 1), 300.0), torch.full((1, 1), -300.0), torch.full((1, 1), 3000.0))
    change = reconstruct._solve([ordinary, huge], index=0)
    assert change.item() > 0.7


def test_masks_and_positions_are_found_without_computing_the_layers(student: Any) -> None:
    layers = student.model.layers
    ids = torch.arange(24).reshape(2, 12) % VOCAB
    seen: list[dict[str, Any]] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(dict(kwargs)), with_kwargs=True
        )
        for layer in layers
    ]
    student.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    computed: list[int] = []
    hook = layers[0].mlp.register_forward_hook(
        lambda _m, args, _o: computed.append(args[0].shape[:2].numel())
    )
    calls = reconstruct._layer_calls(student.model, ids)
    hook.remove()
    assert computed == [1], "one token, to see what a layer returns"
    assert torch.equal(calls[0][0], student.model.embed_tokens(ids))
    for (_, found), wanted in zip(calls, seen, strict=True):
        assert found.keys() == wanted.keys() - {"hidden_states"}
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=0)
    assert all("forward" not in layer.__dict__ for layer in layers)


class _TupleLayer(torch.nn.Module):
    def forward(self, states: Any, *, mask: int) -> tuple[Any, int]:
        return states + 1, mask


class _TupleDecoder(torch.nn.Module):
    """Its layers return tuples, as older architectures' do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(_TupleLayer() for _ in range(2))

    def forward(self, input_ids: Any, use_cache: bool) -> Any:
        states = input_ids[..., None].float()
        for number, layer in enumerate(self.layers):
            states, _ = layer(states, mask=number)
        return states


def test_layers_that_return_tuples_are_passed_over_alike() -> None:
    decoder = _TupleDecoder()
    ids = torch.arange(6).reshape(2, 3)
    calls = reconstruct._layer_calls(decoder, ids)
    assert [kwargs for _, kwargs in calls] == [{"mask": 0}, {"mask": 1}]
    assert all(torch.equal(states[..., 0], ids.float()) for states, _ in calls)
    assert torch.equal(decoder(ids, use_cache=False)[..., 0], ids + 2.0)
