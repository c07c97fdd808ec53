"""One row of another project's file: its lists, their filling, its names."""

from __future__ import annotations

import numpy as np

from pipeline.cache.tools.foreign.formats import RawRow
from pipeline.cache.tools.foreign.importing import _id
from pipeline.cache.tools.foreign.targets import Imported, imported_row


def test_a_row_of_a_file_has_a_name_of_its_own() -> None:
    names = {_id(file, row) for file in ("a" * 32, "b" * 32) for row in range(3)}
    assert len(names) == 6
    assert _id("a" * 32, 1) == _id("a" * 32, 1)


def test_lists_in_any_order_filled_up_to_one_length() -> None:
    ninf = -np.inf
    raw = RawRow(
        input_ids_L=np.array([3, 7, 9]),
        loss_mask_L=np.array([False, True, True]),
        tokens_M=np.array([2, 1]),  # the later token's list first
        counts_M=np.array([3, 3]),
        ids_E=np.array([9, 4, 0, 8, 7, 0]),
        logprobs_E=np.array([np.log(0.5), np.log(0.25), ninf, np.log(0.125), np.log(0.5), ninf]),
    )
    row = imported_row(raw, sample_id="0" * 32, vocab_size=20, lossy=False)
    assert isinstance(row, Imported)
    targets = row.row.targets
    assert targets.counts_N.tolist() == [2, 2]
    assert targets.token_ids_E.tolist() == [7, 8, 4, 9]
    np.testing.assert_allclose(np.exp(targets.logprobs_E), [0.5, 0.125, 0.25, 0.5], rtol=1e-6)
    np.testing.assert_allclose(np.exp(targets.label_logprob_N), [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(row.tail_N, [0.375, 0.25], rtol=1e-6)
    assert (row.most_entries, row.labels_outside) == (2, 0)
