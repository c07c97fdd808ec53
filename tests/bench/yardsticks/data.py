"""Texts of the yardsticks: sequences of the embedded corpus, cut short, and a teacher's states.

Shapes: N supervised tokens of all sequences, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.models.load import load_causal_lm
from tests.bench.fidelity_data import Hidden
from tests.bench.yardsticks.training import states_of

__all__ = ["loaded", "short_texts", "with_states"]


def loaded(folder: Path) -> Any:
    """Load a model folder in float32, in evaluation."""
    return load_causal_lm(folder, dtype="float32", trust_remote_code=False).eval()


def short_texts(samples: list[Any], length: int, weight_VD: NDArray[np.float32]) -> Hidden:
    """Return the beginnings of samples, without a teacher's states.

    Args:
        samples: with `input_ids`, `loss_mask` and `sample_id`.
        length: tokens of a beginning. Of a chat much of it can be the question: samples are left
            out where less than half is supervised.
        weight_VD: the head of the teacher.
    """
    cut = [(s.sample_id, s.input_ids[:length], s.loss_mask[:length]) for s in samples]
    kept = [part for part in cut if 2 * part[2].sum() >= length]
    labels = [ids[loss_mask] for _, ids, loss_mask in kept]
    none_ND = np.zeros((sum(map(len, labels)), 0), np.float16)
    return Hidden(
        none_ND, none_ND, weight_VD, np.concatenate(labels).astype(np.int64),
        [name for name, _, _ in kept], [ids for _, ids, _ in kept], [mask for _, _, mask in kept],
    )  # fmt: skip


@torch.no_grad()
def with_states(folder: Path, data: Hidden, file: Path) -> Hidden:
    """Return the texts with the hidden states of the teacher in a folder; kept in a file."""
    if not file.exists():
        model = loaded(folder)
        parts = [states_of(model, data, index) for index in range(len(data.input_ids))]
        partial = file.with_suffix(".partial.npy")
        np.save(partial, torch.cat(parts).numpy().astype(np.float16))
        partial.rename(file)
    return replace(data, teacher_ND=np.load(file))
