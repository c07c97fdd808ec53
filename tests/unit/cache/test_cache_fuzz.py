"""Damaged columns: a CacheError or valid numbers for any bytes, never a crash.

The decoder's loops are compiled without bounds checks, so the same cases run once more in a process
where numba checks them: a read outside an array is an IndexError there.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import tracemalloc
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.codec.spec import COLUMNS, CodecSpec
from pipeline.cache.codec.subsample import EntryLimit
from pipeline.cache.layout.schema import table_to_rows
from pipeline.errors import CacheError
from pipeline.sampling.inclusion import InclusionRule
from tests.unit.cache.sample_cache import rows_to_table, sample_rows
from tests.unit.cache.sampled_cache import RULES, VOCAB, sampled_rows

GRID = (1.0, 2.0)
_METADATA = b"distill_ranks"


@cache
def _table(rule: InclusionRule | None) -> pa.Table:
    rows, tails = sample_rows(3, 2) if rule is None else sampled_rows(3, 2, rule)
    spec = CodecSpec(VOCAB, rule)
    return rows_to_table(
        rows, spec, temperatures=GRID, identity_digest="0" * 64, tails=tails
    )  # fmt: skip


def _survives(table: pa.Table, rule: InclusionRule | None, limit: EntryLimit) -> None:
    """Decode: either an error, or every number is one that a writer could have written."""
    spec = CodecSpec(VOCAB, rule)
    try:
        rows = table_to_rows(table, spec, GRID, limit)
    except CacheError:
        return
    for row in rows:
        targets = row.targets
        assert targets.counts_N.min(initial=0) >= 0
        assert targets.counts_N.sum() == targets.token_ids_E.size == targets.logprobs_E.size
        assert targets.token_ids_E.min(initial=0) >= 0
        assert targets.token_ids_E.max(initial=0) < VOCAB
        numbers = [
            targets.logprobs_E,
            targets.log_z_NG,
            targets.entropy_NG,
            targets.label_logprob_N,
        ]
        if targets.inclusion_E is not None:
            numbers += [targets.inclusion_E, 1 / targets.inclusion_E]
            assert targets.inclusion_E.min(initial=1) > 0
            assert targets.inclusion_E.max(initial=0) <= 1
        assert all(np.isfinite(values).all() for values in numbers)
        owner_E = np.repeat(np.arange(targets.num_positions), targets.counts_N)
        if rule is None:
            assert len(set(zip(owner_E.tolist(), targets.token_ids_E.tolist(), strict=True))) == (
                targets.token_ids_E.size
            )


def _with_cells(table: pa.Table, name: str, cells: list[bytes]) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(at), pa.array(cells, pa.binary()))


@given(data=st.data(), rule=st.sampled_from([None, *RULES]), name=st.sampled_from(COLUMNS))
@settings(max_examples=300, deadline=None)
def test_a_damaged_column_is_refused_or_harmless(
    data: st.DataObject, rule: InclusionRule | None, name: str
) -> None:
    table = _table(rule)
    cells = table.column(name).to_pylist()
    row = data.draw(st.integers(0, len(cells) - 1))
    cell = bytearray(cells[row])
    kind = data.draw(st.sampled_from(["flip", "set", "cut", "more", "other"]))
    if kind == "other":
        cell = bytearray(data.draw(st.binary(max_size=64)))
    elif kind == "more":
        cell += data.draw(st.binary(min_size=1, max_size=8))
    elif cell:
        at = data.draw(st.integers(0, len(cell) - 1))
        if kind == "flip":
            cell[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            cell[at] = data.draw(st.sampled_from([0, 1, 15, 18, 19, 127, 128, 240, 255]))
        else:
            del cell[at:]
    cells[row] = bytes(cell)
    limit = data.draw(
        st.sampled_from(
            [EntryLimit(), EntryLimit(top_k=2) if rule is None else EntryLimit(None, 2.0)]
        )
    )
    _survives(_with_cells(table, name, cells), rule, limit)


@given(data=st.data(), rule=st.sampled_from([None, *RULES]))
@settings(max_examples=60, deadline=None)
def test_several_damaged_columns_are_refused_or_harmless(
    data: st.DataObject, rule: InclusionRule | None
) -> None:
    """Lengths that agree with each other, but not with the rest."""
    table = _table(rule)
    for name in data.draw(st.sets(st.sampled_from(COLUMNS), min_size=2, max_size=6)):
        cells = table.column(name).to_pylist()
        cells = [bytes(data.draw(st.binary(min_size=len(c), max_size=len(c)))) for c in cells]
        table = _with_cells(table, name, cells)
    _survives(table, rule, EntryLimit())


@pytest.mark.parametrize("rule", [None, *RULES])
@pytest.mark.parametrize("packed", [b"", b"\x00" * 40, None], ids=["missing", "no zstd", "a bomb"])
def test_a_damaged_order_is_refused(rule: InclusionRule | None, packed: bytes | None) -> None:
    import zstandard

    if packed is None:
        packed = base64.b64encode(zstandard.ZstdCompressor().compress(bytes(1 << 28)))
    table = _table(rule)
    metadata = {**table.schema.metadata, _METADATA: packed}
    tracemalloc.start()
    with pytest.raises(CacheError, match="the order of the vocabulary"):
        table_to_rows(table.replace_schema_metadata(metadata), CodecSpec(VOCAB, rule), GRID)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_counts_that_nothing_stands_behind_allocate_nothing() -> None:
    """The counts say 65,535 entries a position; there are a few hundred symbols."""
    table = _table(RULES[1])
    numbers = table.column("num_loss_tokens").to_pylist()
    for name in ("always_kept_counts", "sampled_counts"):
        table = _with_cells(table, name, [b"\xff" * n for n in numbers])
    table = _with_cells(table, "counts_high", [b"\xff" * 2 * n for n in numbers])
    tracemalloc.start()
    with pytest.raises(CacheError, match="differs from the counts"):
        table_to_rows(table, CodecSpec(VOCAB, RULES[1]), GRID)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_columns_of_the_rows_themselves() -> None:
    table = _table(RULES[0])
    spec = CodecSpec(VOCAB, RULES[0])
    for name, values, found in (
        ("num_loss_tokens", [-1, 0, 1], "differ in length"),
        ("num_tokens", [1, 1, 1], "differ in length"),
        ("sample_id", ["x" * 32] * 3, "expected 32 hexadecimal digits"),
        ("input_ids", [[VOCAB] * n for n in table.column("num_tokens").to_pylist()], "vocabulary"),
        ("input_ids", [[-1] * n for n in table.column("num_tokens").to_pylist()], "vocabulary"),
        ("loss_mask", [[True] * n for n in table.column("num_tokens").to_pylist()], "differ|first"),
    ):
        at = table.schema.get_field_index(name)
        damaged = table.set_column(
            at, table.schema.field(at), pa.array(values, table.schema.types[at])
        )
        with pytest.raises(CacheError, match=found):
            table_to_rows(damaged, spec, GRID)


@pytest.mark.slow
def test_no_loop_leaves_its_arrays(tmp_path: Path) -> None:
    """The cases above where numba checks bounds: an IndexError is no CacheError, and fails."""
    environment = {
        **os.environ,
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    code = (
        "import numba, sys, pytest; assert numba.config.BOUNDSCHECK == 1;"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', 'harmless', {__file__!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
