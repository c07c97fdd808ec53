"""The packing trial: short sequences through the student's own weights, packed and alone.

Nothing is known of architectures here. What is right is a sequence alone; a way is accepted where
packing changes no hidden state, and where other neighbours change none either.

Legend: T tokens of the packed row, L of one sequence, D hidden.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.student.forward.body import takes_boundaries, text_config
from pipeline.student.forward.refusal import refusal, refusals_in_words
from pipeline.student.forward.ways import BodyForward, Way

__all__ = [
    "PackingTrial",
    "WayTried",
    "quiet_passes",
    "relative_errors",
    "run_packing_trial",
    "trial_lengths",
    "trial_row",
]

_LENGTHS = (11, 13, 6)
_FLOAT32 = 1e-4
_ROUNDED = 1e-1
"""16 bit: of the middle token. Other shapes round differently (0.01 in 30 layers of bfloat16), and
experts that score alike swap; what neighbours do is measured apart, and finer."""
_ROUNDED_NEIGHBOURS = 1e-3
"""16 bit: of the worst token, in rows of the same shape, whose arithmetic is the same. Kernels that
add in any order differ from themselves; their neighbours may change eight times as much."""


@dataclass(frozen=True, slots=True)
class WayTried:
    """How far the hidden states of one way are from what they should be; inf where it failed."""

    way: Way
    error: float
    """|packed - alone| / |alone| over the tokens' hidden states: the largest, in 16 bit the
    median."""
    seen: float
    """|with these neighbours - with others| / |with these|, the largest over the tokens."""
    right: bool
    refusal: str = ""
    """What the model said where it refused."""


@dataclass(frozen=True, slots=True)
class PackingTrial:
    """The outcome on this rank."""

    tried: tuple[WayTried, ...]
    missing: tuple[str, ...] = ()
    """Packages without which transformers computes a layer by its plain path."""
    lengths: tuple[int, ...] = field(default=_LENGTHS)

    @property
    def right(self) -> Way | None:
        """The first packed way that is right."""
        return next((tried.way for tried in self.tried if tried.right), None)

    @property
    def best(self) -> WayTried:
        """The packed way that came nearest."""
        return min(self.tried, key=lambda tried: max(tried.error, tried.seen))


def run_packing_trial(
    forward: BodyForward,
    model: Any,
    *,
    device: torch.device | str,
    longest_row: int | None = None,
    longest_sequence: int | None = None,
    packed: bool = True,
) -> PackingTrial:
    """Try every packed way, in evaluation mode and without gradients; changes nothing.

    All ranks call it at once: under ZeRO 3 each pass gathers weights. A rank-wide decision is up to
    the caller.

    Args:
        forward: the body, in whatever way.
        model: of which it is the body.
        device: where the weights are.
        longest_row: tokens of the longest packed row there will be; see `trial_lengths`.
        longest_sequence: of the longest sequence.
        packed: False: look at sequences alone only.

    Raises:
        ModelError: the model's code raises, it sees tokens that come later, or its head is not fed
            by its body, so that no way is right.
    """
    lengths = trial_lengths(model, longest_row, longest_sequence)
    ids_1T, positions_1T = trial_row(model, lengths, device)
    others_1T, _ = trial_row(model, lengths, device, salt=29)
    middle = slice(lengths[0], lengths[0] + lengths[1])
    others_1T[:, middle] = ids_1T[:, middle]
    ways: list[Way] = ["positions"]
    if takes_boundaries(forward.body):
        ways.insert(0, "boundaries")
    if not packed:
        ways = []
    before = forward.way
    try:
        with quiet_passes(model), _missing_packages() as missing:
            forward.way = "alone"
            with refusals_in_words(model, "one sequence after the other"):
                alone_TD = forward(ids_1T, positions_1T, lengths).hidden_TD
                _check_head(model, ids_1T[:, middle], alone_TD[middle])
            _check_causal(forward, ids_1T[:, middle], positions_1T[:, middle], alone_TD[middle])
            tried = []
            for way in ways:
                forward.way = way
                tried.append(
                    _try(forward, ids_1T, others_1T, positions_1T, lengths, alone_TD, middle)
                )
    finally:
        forward.way = before
    return PackingTrial(tuple(tried), tuple(sorted(missing)), lengths)


def trial_lengths(
    model: Any, longest_row: int | None = None, longest_sequence: int | None = None
) -> tuple[int, ...]:
    """Return the lengths of the sequences of the trial.

    A model that attends in chunks does so after thousands of tokens only, and rotations may change
    with the longest position of a row. Where rows or sequences will be that long, the first
    sequence of the trial is too: a chunk ends within the second.

    Args:
        model: whose config names the number.
        longest_row: tokens of the longest packed row there will be; None: as long as may be.
        longest_sequence: of the longest sequence; None: as long as may be.
    """
    config = text_config(model)
    ropes = [getattr(config, name, None) or {} for name in ("rope_parameters", "rope_scaling")]
    rope = next((rope for rope in ropes if rope), {})
    limits = [(getattr(config, "attention_chunk_size", None), longest_row, -_LENGTHS[1] // 2)]
    if rope.get("rope_type") in ("longrope", "dynamic"):
        named = rope.get("original_max_position_embeddings")
        named = named or getattr(config, "original_max_position_embeddings", None)
        limits.append((named, longest_sequence, 1))
    first = _LENGTHS[0]
    for limit, longest, beyond in limits:
        if isinstance(limit, int) and (longest is None or limit < longest):
            first = max(first, limit + beyond)
    return (first, *_LENGTHS[1:])


def _try(
    forward: BodyForward,
    ids_1T: Tensor,
    others_1T: Tensor,
    positions_1T: Tensor,
    lengths: tuple[int, ...],
    alone_TD: Tensor,
    middle: slice,
) -> WayTried:
    try:
        packed_TD = forward(ids_1T, positions_1T, lengths).hidden_TD
        beside_TD = forward(others_1T, positions_1T, lengths).hidden_TD
        again_TD = forward(ids_1T, positions_1T, lengths).hidden_TD
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        return WayTried(forward.way, float("inf"), float("inf"), right=False, refusal=reason)
    error_T = relative_errors(packed_TD, alone_TD)
    seen = float(relative_errors(beside_TD[middle], packed_TD[middle]).max())
    if packed_TD.dtype == torch.float32:
        worst = float(error_T.max())
        right = worst <= _FLOAT32 and seen <= _FLOAT32
    else:
        # One sequence that is wrong as a whole is enough to be wrong.
        worst = max(float(part_L.median()) for part_L in torch.split(error_T, list(lengths)))
        noise = float(relative_errors(again_TD, packed_TD).max())
        right = worst <= _ROUNDED and seen <= max(_ROUNDED_NEIGHBOURS, 8 * noise)
    return WayTried(forward.way, worst, seen, right=right)


def _check_head(model: Any, ids_1L: Tensor, alone_LD: Tensor) -> None:
    """Reject a model that does something between its body and its head."""
    fed: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, args: fed.append(args[0])
    )
    try:
        model(input_ids=ids_1L, use_cache=False)
    finally:
        hook.remove()
    error_L = relative_errors(fed[-1].reshape(-1, fed[-1].shape[-1]), alone_LD)
    exact = alone_LD.dtype == torch.float32
    error = float(error_L.max() if exact else error_L.median())
    if not error <= (_FLOAT32 if exact else _ROUNDED):
        raise ModelError(
            f"the head of {type(model).__name__} is not fed the last hidden states of its body "
            f"(they differ by {error:.2g} of their size)",
            expected="a causal language model whose head follows its body",
            do="choose another student",
        )


def _check_causal(
    forward: BodyForward, ids_1L: Tensor, positions_1L: Tensor, alone_LD: Tensor
) -> None:
    """Reject a model that attends to what comes later, as one without its mask does."""
    changed_1L = ids_1L.clone()
    changed_1L[:, -1] = ids_1L[:, 0]
    changed_LD = forward(changed_1L, positions_1L, (ids_1L.shape[1],)).hidden_TD
    bound = _FLOAT32 if alone_LD.dtype == torch.float32 else _ROUNDED
    seen = float(relative_errors(changed_LD[:-1], alone_LD[:-1]).max())
    if not seen <= bound:
        raise ModelError(
            f"the student's hidden states change by {seen:.2g} with a token that comes later",
            expected="a causal language model whose attention is masked",
            do="choose another student, or --student.attention eager",
        )


def trial_row(
    model: Any, lengths: tuple[int, ...], device: torch.device | str, *, salt: int = 11
) -> tuple[Tensor, Tensor]:
    """Return ids and restarting positions, int64 [1, T]; alike on all ranks.

    The ids are from all over the vocabulary; another `salt` gives others.
    """
    total, vocabulary = sum(lengths), int(text_config(model).vocab_size)
    ids_1T = (torch.arange(total) * 7919 + salt * 104729)[None] % vocabulary
    positions_1T = torch.cat([torch.arange(length) for length in lengths])[None]
    return ids_1T.to(device), positions_1T.to(device)


def relative_errors(found_TD: Tensor, expected_TD: Tensor) -> Tensor:
    """Return |found - expected| / |expected| of each token; inf where a number is none."""
    difference_T = (found_TD.double() - expected_TD.double()).norm(dim=-1)
    error_T = difference_T / expected_TD.double().norm(dim=-1).clamp(min=1e-12)
    return torch.where(error_T.isfinite(), error_T, float("inf"))


@contextmanager
def quiet_passes(model: Any) -> Iterator[None]:
    """While open, passes are as in evaluation, without gradients, and nothing is compiled."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)


class _Missing(logging.Handler):
    """Collects which packages transformers says it does without."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"because `([^`]+)` is not installed", record.getMessage())
        if found:
            self.found.add(found[1])


@contextmanager
def _missing_packages() -> Iterator[set[str]]:
    """While open, collect what transformers warns of once a process, instead of printing it."""
    from transformers.utils import logging as transformers_logging

    # A pass before may have been warned already; what is collected here is not warned again.
    forget = getattr(transformers_logging.warning_once, "cache_clear", None)
    if forget is not None:
        forget()
    logger = logging.getLogger("transformers.integrations.hub_kernels")
    handler, passes_on = _Missing(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)
        logger.propagate = passes_on
