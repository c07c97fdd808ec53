"""Layer reconstruction of a pruned student: least squares on the MLPs' output projections.

After layers are pruned, a kept layer hands its successor hidden states the successor has never
seen. For each kept layer j in turn, its MLP output projection W is refitted so that the layer's
output comes as near as possible to what the unpruned model feeds into the next kept layer:

    min_W  sum_t  w_t |target_t - residual_t - W a_t|^2  +  lam |W - W_0|^2

with a the projection's input, and w_t = 1 / |target_t|^2, without which a few tokens of huge norm
(the first of a sequence, most of all) decide everything. The order is sequential: layer j + 1 sees
what the reconstructed layers before it produce. In the spirit of layer-wise reconstruction as in
SparseGPT (Frantar & Alistarh 2023) and of the linear patches of ReplaceMe (2025).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ModelError
from pipeline.student.forward.body import text_body

__all__ = ["check_reconstruction", "reconstruct_student"]

_log = logging.getLogger(__name__)
_RIDGE = 0.2
_BATCH_SEQUENCES = 16
_AFTER_PROJECTION = ("post_feedforward_layernorm", "post_mlp_layernorm", "residual_multiplier")


def reconstruct_student(
    student: Any, source: Any, keep_layers: Sequence[int], sequences: Sequence[NDArray[np.int32]]
) -> None:
    """Refit `student` in place so that it follows `source`, the model it was pruned from.

    Args:
        student: the pruned model, on the CPU or a GPU, in float32.
        source: the unpruned model, likewise.
        keep_layers: the source's layer of each student layer.
        sequences: token ids to compare on, a few thousand tokens.

    Raises:
        ModelError: the architecture does not add the projection's output as it is (extra norms
            after it as in Gemma 2 and GLM 4, or a factor as in Granite).
    """
    import torch

    own, original = _decoder(student), _decoder(source)
    batches = _batches(sequences, next(student.parameters()).device)
    with torch.no_grad():
        goals = [_hidden_states(original, ids, keep_layers) for ids, _ in batches]
        calls = [_layer_calls(own, ids) for ids, _ in batches]
        hidden = [call[0][0] for call in calls]
        for index, layer in enumerate(own.layers):
            runs = [
                _run_layer(layer, states, call[index][1])
                for states, call in zip(hidden, calls, strict=True)
            ]
            change_FD = _solve(
                [
                    (inputs[mask].float(), (goal[index] - output)[mask].float(), goal[index][mask])
                    for (inputs, output), goal, (_, mask) in zip(runs, goals, batches, strict=True)
                ],
                index,
            )
            projection = layer.mlp.down_proj
            projection.weight += change_FD.T.to(projection.weight)
            hidden = [
                output + (inputs.float() @ change_FD.to(inputs.device)).to(output)
                for inputs, output in runs
            ]


def check_reconstruction(model: Any) -> None:
    """Reject a model whose layers cannot be refitted; needs no weights.

    Raises:
        ModelError: as `reconstruct_student`.
    """
    _decoder(model)


def _solve(parts: list[tuple[Any, Any, Any]], index: int) -> Any:
    """Return the change of W (transposed) that the weighted ridge regression asks for."""
    import torch

    width, out = parts[0][0].shape[1], parts[0][1].shape[1]
    gram_FF, cross_FD = torch.zeros(width, width), torch.zeros(width, out)
    before = 0.0
    for a_TF, missing_TD, goal_TD in parts:
        weight_T1 = 1.0 / goal_TD.float().norm(dim=1, keepdim=True).clamp_min(1e-6)
        a_TF, missing_TD = a_TF * weight_T1, missing_TD * weight_T1
        gram_FF += (a_TF.T @ a_TF).cpu()
        cross_FD += (a_TF.T @ missing_TD).cpu()
        before += float(missing_TD.square().sum())
    ridge_FF = _RIDGE * gram_FF.diagonal().mean() * torch.eye(width)
    change_FD = torch.linalg.solve(gram_FF + ridge_FF, cross_FD)
    gain = float((2 * cross_FD * change_FD).sum() - (gram_FF @ change_FD * change_FD).sum())
    tokens = sum(len(part[0]) for part in parts)
    _log.info(
        "reconstructed layer %d: relative squared error %.4f -> %.4f",
        index, before / tokens, (before - gain) / tokens,
    )  # fmt: skip
    return change_FD


def _decoder(model: Any) -> Any:
    decoder = text_body(model)
    layers = getattr(decoder, "layers", None)
    plain = layers is not None and all(
        hasattr(layer, "mlp")
        and hasattr(layer.mlp, "down_proj")
        and not any(hasattr(layer, name) for name in _AFTER_PROJECTION)
        for layer in layers
    )
    if not plain:
        raise ModelError(
            f"student.reconstruct on {type(model).__name__}",
            expected="decoder layers that end in mlp.down_proj (Llama, Qwen, Mistral, ...)",
            do="use --student.reconstruct none",
        )
    return decoder


def _batches(sequences: Sequence[NDArray[np.int32]], device: Any) -> list[tuple[Any, Any]]:
    """Right-padded id batches and masks of the real tokens; causal, so padding is unseen."""
    import torch

    ordered = sorted(sequences, key=len)
    batches = []
    for start in range(0, len(ordered), _BATCH_SEQUENCES):
        group = ordered[start : start + _BATCH_SEQUENCES]
        ids = torch.zeros((len(group), len(group[-1])), dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, sequence in enumerate(group):
            ids[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
            mask[row, : len(sequence)] = True
        batches.append((ids.to(device), mask.to(device)))
    return batches


def _hidden_states(decoder: Any, ids: Any, keep_layers: Sequence[int]) -> list[Any]:
    """For each kept layer: what the next kept layer is fed in the unpruned model."""
    nexts = [*keep_layers[1:], len(decoder.layers)]
    outputs: dict[int, Any] = {}
    hooks = [
        decoder.layers[after - 1].register_forward_hook(
            lambda _m, _a, out, after=after: outputs.__setitem__(after, _first(out).detach())
        )
        for after in set(nexts)
    ]
    try:
        decoder(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [outputs[after] for after in nexts]


def _layer_calls(decoder: Any, ids: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Return what each layer is called with: hidden states, and masks and positions by name.

    The latter do not depend on the hidden states, so each layer can be run alone afterwards, and
    here the layers compute nothing. The hidden states are those of the first one alone.
    """
    calls: list[tuple[Any, dict[str, Any]]] = []

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        states = args[0] if args else kwargs.pop("hidden_states")
        calls.append((states, kwargs))

    with _passing_on(decoder, ids[:1, :1]):
        hooks = [one.register_forward_pre_hook(keep, with_kwargs=True) for one in decoder.layers]
        try:
            decoder(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    return calls


@contextmanager
def _passing_on(decoder: Any, ids: Any) -> Iterator[None]:
    """While open, the layers return the hidden states that they get, as what they return else.

    Args:
        decoder: of which they are.
        ids: of a token, which goes through them to see whether they return a tuple.
    """
    rests: list[tuple[Any, ...] | None] = []

    def note(_module: Any, _args: Any, output: Any) -> None:
        rests.append(output[1:] if isinstance(output, tuple) else None)

    hooks = [layer.register_forward_hook(note) for layer in decoder.layers]
    try:
        decoder(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()

    def passing(rest: tuple[Any, ...] | None) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            return states if rest is None else (states, *rest)

        return forward

    own = [layer.__dict__.get("forward") for layer in decoder.layers]
    try:
        for layer, rest in zip(decoder.layers, rests, strict=True):
            layer.forward = passing(rest)
        yield
    finally:
        for layer, before in zip(decoder.layers, own, strict=True):
            layer.__dict__.pop("forward", None)
            if before is not None:
                layer.forward = before


def _run_layer(layer: Any, states: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the input of the layer's output projection, and the layer's output."""
    seen: list[Any] = []
    hook = layer.mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    try:
        output = _first(layer(states, **kwargs))
    finally:
        hook.remove()
    return seen[0], output


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
