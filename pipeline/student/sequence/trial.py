"""The trial of slices: a short row through the student's own weights, whole and sliced.

Nothing is known of architectures here: a layer that looks at other tokens by anything else than
transformers' attention, or by one that is more than causal, gives other hidden states.

Shapes: T tokens of the row, S of a slice, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import ModelError
from pipeline.student.forward.body import text_config
from pipeline.student.forward.refusal import refusals_in_words
from pipeline.student.forward.trial import quiet_passes, relative_errors, trial_row
from pipeline.student.forward.ways import BodyForward
from pipeline.student.sequence.groups import SequenceGroup
from pipeline.student.sequence.sliced import SlicedForward

__all__ = ["run_slice_trial", "trial_lengths"]

_LENGTHS = (11, 13, 6)
_FLOAT32 = 1e-4
_ROUNDED = 5e-2
"""16 bit: of the middle token; exchanged heads are added up in another order."""
_LONGEST_WINDOW = 4096


def trial_lengths(model: Any, size: int) -> tuple[int, ...]:
    """Return the lengths of the trial's sequences, together a multiple of `size`.

    The first is longer than a sliding window of up to 4,096 tokens, so that it is seen to slide.

    Args:
        model: whose config names the window.
        size: number of slices.
    """
    window = getattr(text_config(model), "sliding_window", None) or 0
    first = max(_LENGTHS[0], window + 3 if window <= _LONGEST_WINDOW else 0)
    rest = -(first + sum(_LENGTHS[1:])) % size
    return (first, *_LENGTHS[1:-1], _LENGTHS[-1] + rest)


def run_slice_trial(
    whole: BodyForward,
    sliced: SlicedForward,
    model: Any,
    *,
    install: Callable[[], None],
    group: SequenceGroup,
    device: Any,
) -> None:
    """Compare this process's slice with the same tokens of the whole row; all ranks at once.

    Args:
        whole: the forward of whole rows, which runs before `install`.
        sliced: the forward of slices, which runs after it.
        model: of transformers, in evaluation mode during the trial.
        install: puts the attention of slices into the model.
        group: this process's.
        device: where the weights are.

    Raises:
        ModelError: on all ranks where the hidden states of any of them differ, or the model raises.
    """
    lengths = trial_lengths(model, group.size)
    total = sum(lengths)
    ids_1T, positions_1T = trial_row(model, lengths, device)
    each = total // group.size
    mine = slice(group.part * each, (group.part + 1) * each)
    with quiet_passes(model):
        expected_SD = whole(ids_1T, positions_1T, lengths).hidden_TD[mine]
        with refusals_in_words(model, "slices of sequences (train.sequence_parallel_size)"):
            install()
            found_SD = sliced(ids_1T[:, mine], positions_1T[:, mine], lengths).hidden_TD
    error_S = relative_errors(found_SD, expected_SD)
    is_float32 = found_SD.dtype == torch.float32
    error = error_S.max() if is_float32 else error_S.median()
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    bound = _FLOAT32 if is_float32 else _ROUNDED
    if not float(error) <= bound:
        raise ModelError(
            f"slices change the hidden states of {type(model).__name__} by {float(error):.2g} of "
            "their size",
            expected=f"at most {bound:g}: a student whose layers look at other tokens only by "
            "transformers' attention",
            do="train it with train.sequence_parallel_size 1",
        )
