"""The plain export holds what the cache decodes to, for readers without its codec."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import open_cache
from pipeline.errors import CacheError

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "cache-v1-top-k"


def test_lists_equal_the_decoded_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(GOLDEN), str(tmp_path)]) == 0
    cache = open_cache(str(GOLDEN))
    total = 0
    for split in ("train", "heldout"):
        source = cache.source(split)
        for shard, count in enumerate(source.shard_rows()):
            plain = pq.read_table(tmp_path / source.shards[shard].path).to_pylist()
            rows = source.read_rows(shard, range(count))
            assert len(plain) == len(rows)
            for got, row in zip(plain, rows, strict=True):
                assert got["sample_id"] == row.sample_id
                assert got["input_ids"] == row.input_ids_L.tolist()
                assert got["loss_mask"] == row.loss_mask_L.tolist()
                assert [len(ids) for ids in got["target_ids"]] == row.targets.counts_N.tolist()
                assert (
                    list(chain.from_iterable(got["target_ids"])) == row.targets.token_ids_E.tolist()
                )
                flat = np.array(list(chain.from_iterable(got["target_logprobs"])), np.float32)
                np.testing.assert_allclose(flat, row.targets.logprobs_E, rtol=1e-3)
            total += count
    assert f"{total} rows" in capsys.readouterr().out


def test_an_export_goes_on_where_it_stopped(tmp_path: Path) -> None:
    main(["export", str(GOLDEN), str(tmp_path)])
    files = sorted(tmp_path.rglob("*.parquet"))
    files[0].unlink()
    times = {file: file.stat().st_mtime_ns for file in files[1:]}
    main(["export", str(GOLDEN), str(tmp_path)])
    assert files[0].exists()
    assert times == {file: file.stat().st_mtime_ns for file in files[1:]}


def test_the_cache_itself_is_no_target() -> None:
    for target in (GOLDEN, GOLDEN / "plain"):
        with pytest.raises(CacheError, match="apart from the sources"):
            main(["export", str(GOLDEN), str(target)])
    assert not (GOLDEN / "plain").exists()
