"""A slice is a complete cache with exactly the requested content, the same every time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.codec.targets import SparseTargets
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.tables import encode_table, table_from_bytes
from pipeline.cache.tools.verify import verify_cache
from pipeline.errors import CacheError, ConfigError
from pipeline.storage import Store
from tests.conftest import digests
from tests.unit.cache.planned_cache import flip, lose
from tests.unit.cache.sample_cache import SHARD, read_all, sample_shard
from tests.unit.cache.sampled_cache import write_sampled_cache


def _rows(folder: Path) -> dict[str, Any]:
    return {row.sample_id: row for row in read_all(open_cache(str(folder)))}


def _slice(source: Path, target: Path, *flags: object) -> dict[str, Any]:
    assert main(["slice", str(source), str(target), *map(str, flags)]) == 0
    assert verify_cache(Store(str(target))) == []
    return _rows(target)


def test_columns_written_again_are_the_same_bytes() -> None:
    record, data = sample_shard("train", 1, 3)
    table = table_from_bytes(data, None)
    from pipeline.cache.layout.schema import read_footer

    digest = read_footer(table.schema.metadata)["identity_digest"]
    again, same = encode_table([table], split="train", index=1, identity_digest=digest)
    assert same == data
    assert again == record
    parts = [table.slice(0, 1), table.slice(1, 0), table.slice(1)]
    assert encode_table(parts, split="train", index=1, identity_digest=digest)[1] == data


def _largest(targets: SparseTargets, k: int) -> tuple[list[int], list[float]]:
    """Return the k entries of highest log p of each position, by ascending id."""
    ids: list[int] = []
    values: list[float] = []
    ends = np.cumsum(targets.counts_N)
    for start, end in zip(ends - targets.counts_N, ends, strict=True):
        pairs = list(zip(targets.token_ids_E[start:end].tolist(),
                         targets.logprobs_E[start:end].tolist(), strict=True))  # fmt: skip
        for token, value in sorted(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:k]):
            ids.append(token)
            values.append(value)
    return ids, values


def test_fewer_entries(made: Path, tmp_path: Path) -> None:
    before, after = _rows(made), _slice(made, tmp_path / "a", "--top-k", 2)
    assert before.keys() == after.keys()
    identity = open_cache(str(tmp_path / "a")).manifest.identity
    source = open_cache(str(made)).manifest
    assert identity["scheme"] == {**source.identity["scheme"], "top_k": 2}
    assert identity["derived"] == {
        "from": source.identity_digest,
        "how": {"command": "slice", "top_k": 2},
    }
    for name, row in after.items():
        old = before[name].targets
        assert row.targets.log_z_NG.tolist() == old.log_z_NG.tolist()
        assert row.targets.counts_N.tolist() == np.minimum(old.counts_N, 2).tolist()
        ids, values = _largest(old, 2)
        assert row.targets.token_ids_E.tolist() == ids
        # The largest is a remainder: within a quantisation step, as before.
        np.testing.assert_allclose(row.targets.logprobs_E, values, atol=0.7)


def test_subsets_are_nested_and_untouched(made: Path, tmp_path: Path) -> None:
    before = _rows(made)
    three = _slice(made, tmp_path / "3", "--samples", 3)
    six = _slice(made, tmp_path / "6", "--samples", 6)
    assert len(three) == 3
    assert len(six) == 6
    assert three.keys() < six.keys() < before.keys()
    half = _slice(made, tmp_path / "half", "--fraction", 0.5)
    assert half.keys() < before.keys()
    assert half.keys() <= six.keys() or six.keys() <= half.keys()  # one order of the samples
    for name, row in six.items():
        for column in ("counts_N", "token_ids_E", "logprobs_E", "log_z_NG", "label_logprob_N"):
            a, b = getattr(row.targets, column), getattr(before[name].targets, column)
            assert a.tolist() == b.tolist()


def test_named_samples_and_splits(made: Path, tmp_path: Path) -> None:
    cache = open_cache(str(made))
    names = [row.sample_id for row in cache.source("train").read_rows(1, range(3))]
    (tmp_path / "ids").write_text("\n".join(names[:2]) + "\n\n")
    assert set(_slice(made, tmp_path / "a", "--ids", tmp_path / "ids")) == set(names[:2])
    train = _slice(made, tmp_path / "b", "--split", "train")
    heldout = _slice(made, tmp_path / "c", "--split", "heldout")
    assert (len(train), len(heldout)) == (8, 2)
    assert not train.keys() & heldout.keys()
    assert not list((tmp_path / "c").glob("data/heldout/*"))
    (tmp_path / "ids").write_text(f"{names[0]}\nffff\n")
    with pytest.raises(CacheError, match=r"1 of 2 sample ids are not in .*: ffff"):
        main(["slice", str(made), str(tmp_path / "d"), "--ids", str(tmp_path / "ids")])
    assert not (tmp_path / "d").exists()


def test_the_same_command_goes_on_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    target, source = tmp_path / "a", digests(made)
    flags = ["slice", str(made), str(target), "--top-k", "3", "--samples", "9"]
    assert main(flags) == 0
    whole = digests(target)
    lose(target, ("train", 1))
    assert main(flags) == 0
    assert digests(target) == whole
    assert digests(made) == source


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--top-k", "7"], "holds 6 entries"),
        (["--samples", "11"], "holds 10 samples"),
        (["--fraction", "1e-9"], "no training sample is left"),
    ],
)
def test_what_does_not_fit_is_refused(
    flags: list[str], says: str, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(CacheError, match=says):
        main(["slice", str(made), str(tmp_path / "a"), *flags])
    assert not (tmp_path / "a").exists()


def test_wrong_flags_are_one_message(made: Path, tmp_path: Path) -> None:
    for flags, says in (
        ([], "no part of the cache was chosen"),
        (["--fraction", "2"], "expected a number above 0 and at most 1"),
        (["--top-k", "0"], "expected a whole number, at least 1"),
        (["--samples", "3", "--fraction", "0.5"], "not allowed with"),
        (["--ids", str(tmp_path / "none")], "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=says):
            main(["slice", str(made), str(tmp_path / "a"), *flags])


def test_targets_that_are_no_place_for_it(cache_dir: Path, tmp_path: Path) -> None:
    source = digests(cache_dir)
    for target in (cache_dir, cache_dir / "within", cache_dir.parent):
        with pytest.raises(CacheError, match="apart from the sources"):
            main(["slice", str(cache_dir), str(target), "--samples", "3"])
    other = tmp_path / "elsewhere" / "other"
    shutil.copytree(cache_dir, other)
    with pytest.raises(CacheError, match="holds another cache"):
        main(["slice", str(cache_dir), str(other), "--samples", "3"])
    assert digests(cache_dir) == source == digests(other)
    flip(cache_dir / SHARD, 1)
    with pytest.raises(CacheError, match=f"{SHARD}: shard damaged.*repair"):
        main(["slice", str(cache_dir), str(tmp_path / "elsewhere/b"), "--samples", "3"])


def test_a_derived_cache_is_mended_by_the_command_that_made_it(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["slice", str(made), str(tmp_path / "a"), "--samples", "4"]
    assert main(flags) == 0
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert "command slice, samples 4" in capsys.readouterr().out
    whole = digests(tmp_path / "a")
    flip(tmp_path / "a/data/train/00000.parquet", 50)
    with pytest.raises(CacheError, match=r"run the same `slice` command again.* 1 shards"):
        main(["repair", str(tmp_path / "a")])
    with pytest.raises(CacheError, match=r"missing: train-00000"):
        open_cache(str(tmp_path / "a"))
    assert main(flags) == 0
    assert digests(tmp_path / "a") == whole


def test_export_of_the_largest_entries(made: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "plain")
    assert main(["export", str(made), target, "--top-k", "2"]) == 0
    assert main(["export", str(made), target, "--top-k", "2"]) == 0
    lists = pq.read_table(tmp_path / "plain" / SHARD)["target_ids"].to_pylist()
    assert max(len(ids) for row in lists for ids in row) == 2
    with pytest.raises(CacheError, match="another --top-k"):
        main(["export", str(made), target])
    with pytest.raises(CacheError, match="holds a cache"):
        main(["export", str(made), str(shutil.copytree(made, tmp_path / "copy"))])


def test_a_thinned_cache_is_read_by_its_own_rule(tmp_path: Path) -> None:
    """Else each entry's weight would be that of a cache with more of them."""
    source, target = tmp_path / "source", tmp_path / "target"
    write_sampled_cache(str(source))
    whole = open_cache(str(source))
    thinned = _slice(source, target, "--tau-factor", 4)
    cache = open_cache(str(target))
    assert whole.rule is not None
    assert cache.rule == whole.rule.scaled(4)
    assert cache.manifest.identity["scheme"]["taus"] == list(cache.rule.taus)
    for row in whole.rows("train", tau_factor=4):
        found = thinned[row.sample_id].targets
        assert found.token_ids_E.tolist() == row.targets.token_ids_E.tolist()
        assert row.targets.inclusion_E is not None
        assert found.inclusion_E.tolist() == row.targets.inclusion_E.tolist()
