"""Caches of format version 1 in the commands of today, and kernels where nothing can be kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import open_cache
from pipeline.cache.layout.schema import table_to_rows
from pipeline.cache.tools.verify import verify_cache
from pipeline.errors import CacheError
from pipeline.storage import Store
from tests.unit.cache.sample_cache import read_all

OLD = Path(__file__).parents[2] / "golden/cache-v1"


def test_version_1_in_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = tmp_path / "one"
    shutil.copytree(OLD, one)
    for command in ("inspect", "stats"):
        assert main([command, str(one)]) == 0
    assert main(["slice", str(one), str(tmp_path / "copy"), "--fraction", "1"]) == 0
    assert main(["slice", str(one), str(tmp_path / "two"), "--top-k", "2"]) == 0
    assert main(["export", str(one), str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    before, copy = read_all(open_cache(str(one))), read_all(open_cache(str(tmp_path / "copy")))
    for old, new in zip(before, copy, strict=True):
        assert old.sample_id == new.sample_id
        for name in ("counts_N", "token_ids_E", "logprobs_E", "log_z_NG", "entropy_NG"):
            assert getattr(old.targets, name).tolist() == getattr(new.targets, name).tolist()
    two = open_cache(str(tmp_path / "two"))
    assert two.manifest.format_version == 1
    assert verify_cache(two.store) == []
    source = open_cache(str(one)).source("train", top_k=2)
    rows = [row for s, n in enumerate(source.shard_rows()) for row in source.read_rows(s, range(n))]
    for row, stored in zip(rows, read_all(two), strict=False):
        assert row.targets.token_ids_E.tolist() == stored.targets.token_ids_E.tolist()
    known = source.read_statistics(0, [0])[0]
    assert known.entropy_NG.tolist() == rows[0].targets.entropy_NG.tolist()
    with pytest.raises(CacheError, match="nothing in it was drawn"):
        open_cache(str(one)).source("train", tau_factor=2.0)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("tail_mass", np.nan, "tail_mass is not finite"),
        ("log_z", np.inf, "log_z is not finite"),
        ("entropy", np.nan, "entropy is not finite"),
        ("gold_logprob", -np.inf, "gold_logprob is not finite"),
        ("input_ids", 1 << 24, "a counted token is outside the vocabulary"),
        ("input_ids", -1, "a counted token is outside the vocabulary"),
        ("counted", None, "counts its first token"),
    ],
)
def test_damaged_numbers_of_version_1(name: str, value: float | None, found: str) -> None:
    """What FORMAT.md 6.1 names beside the blob; such a row never reaches a loss."""
    cache = open_cache(str(OLD))
    table = pq.read_table(OLD / "data/train/00000.parquet")
    cells = table.column(name).to_pylist()
    if value is None:
        cells[0] = cells[0][::-1]
        assert cells[0][0]
        assert not cells[0][-1]
    else:
        cells[0] = [value] * len(cells[0])
    at = table.schema.get_field_index(name)
    column = pa.array(cells, table.schema.types[at])
    damaged = table.set_column(at, table.schema.field(at), column)
    assert len(table_to_rows(table, cache.spec, cache.manifest.temperatures)) == table.num_rows
    with pytest.raises(CacheError, match=found):
        table_to_rows(damaged, cache.spec, cache.manifest.temperatures)


def test_versions_are_not_merged(tmp_path: Path) -> None:
    from tests.unit.cache.sample_cache import write_cache

    write_cache(str(tmp_path / "new"))
    shutil.copytree(OLD, tmp_path / "old")
    with pytest.raises(CacheError, match="codec"):
        main(["merge", str(tmp_path / "sum"), str(tmp_path / "new"), str(tmp_path / "old")])
    assert not Store(str(tmp_path / "sum")).exists("_meta/manifest.json")


def test_kernels_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba refuses to decorate there; the kernels are compiled in the process then."""
    import numba

    from pipeline.cache.codec.jit import kernel

    real = numba.njit

    def njit(*, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(numba, "njit", njit)

    def double(values: np.ndarray) -> int:
        return 2 * len(values)

    assert kernel(double)(np.zeros(3)) == 6
