"""Reduces rows of logits on a CPU to finished columns, in blocks that several threads take.

Legend: R rows (positions), V vocabulary, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cpu_blocks import for_each_block
from pipeline.teacher.sparsify.cpu.kernels import reduce_rows
from pipeline.teacher.sparsify.sparse_scheme import LOWEST_LOG_P, SparseScheme

if TYPE_CHECKING:
    import torch

__all__ = ["reduce_on_cpu"]

_BLOCK_BYTES = 2 << 20
"""Of float32 rows that a thread takes at a time."""
_WIDEST_GROUP = 64
_GROUPS_EACH = 4
"""Groups for each place, as far as the vocabulary allows: then few entries reach the last place's
border that do not get a place."""


def reduce_on_cpu(
    logits_RV: torch.Tensor, label_R: torch.Tensor, scheme: SparseScheme, noise_R: torch.Tensor
) -> torch.Tensor:
    """Reduce rows of logits to columns; arguments and result are those of `device.sparsify`.

    Each row is reduced by itself, so that its bits depend on no other row and on no number of
    threads.

    Raises:
        IndexError: a label that is no token; the loops do not check.
    """
    import torch

    rows, vocab = logits_RV.shape
    if not 0 <= int(label_R.min()) <= int(label_R.max()) < vocab:
        raise IndexError(f"a label outside the {vocab} tokens of the vocabulary")
    rule, quantisation, places = scheme.rule, scheme.quantisation, scheme.always_kept_places
    columns_RC = torch.empty((rows, scheme.num_columns), dtype=torch.float32)
    label_of, noise_of = label_R.contiguous().numpy(), noise_R.contiguous().numpy()
    temperatures_G = np.array(scheme.temperatures, np.float64)
    taus_G = np.array(rule.taus if rule else np.zeros(len(temperatures_G)), np.float64)
    width = max(1, min(_WIDEST_GROUP, vocab // (_GROUPS_EACH * (places + 1))))
    codes = math.ceil(LOWEST_LOG_P / quantisation.sampled_step) + 2
    block = max(1, _BLOCK_BYTES // (4 * vocab))

    def open_worker() -> Callable[[int], None]:
        memory = (
            np.empty(vocab // width, np.float32),
            np.empty(codes, np.int32),
            np.empty(vocab if rule else 0, np.int32),
        )

        def run(start: int) -> None:
            some = slice(start, start + block)
            reduce_rows(
                logits_RV[some].to(torch.float32).contiguous().numpy(),
                label_of[some], noise_of[some], temperatures_G, taus_G, scheme.top_k, places,
                quantisation.log_z_step, quantisation.sampled_step, scheme.step_bits,
                scheme.most_steps, *memory, columns_RC[some].numpy(),
            )  # fmt: skip

        return run

    for_each_block(range(0, rows, block), open_worker)
    return columns_RC
