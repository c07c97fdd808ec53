"""Filters of training rows: a safe language, statistics without entries, what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.api.settings import StudentRun
from pipeline.cache.io import row_statistics as statistics
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.row_statistics import ROW_STATISTICS, _load, row_statistics
from pipeline.config import parse_command
from pipeline.data.expression import parse_expression
from pipeline.data.filter import FilteredRows, filter_rows
from pipeline.data.mixture.caches import filtered_training_rows, open_caches
from pipeline.data.mixture.rows import MixedRows
from pipeline.data.mixture.settings import CacheShare
from pipeline.data.settings import _FILTERED_BY, DataSettings
from pipeline.errors import CacheError, ConfigError
from tests.unit.cache.sample_cache import SHARD, write_cache

KNOWN = ("tokens", "surprise")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "local"))


def test_a_condition_is_computed_for_all_rows_at_once() -> None:
    values = {"tokens": np.array([1.0, 5, 9]), "surprise": np.array([4.0, 0, 2])}
    for text, wanted in (
        ("tokens > 4", [False, True, True]),
        ("1 < tokens < 9", [False, True, False]),
        ("not tokens > 4 or surprise == 2", [True, False, True]),
        ("surprise / tokens >= 0.2 and tokens - 1 < 2 * 4 + 1", [True, False, True]),
        ("(tokens + surprise) != -(-5)", [False, False, True]),
        ("tokens / surprise > 3", [False, True, True]),
        ("not 1 < 2 or tokens > 4", [False, True, True]),
        ("1 / 0 > tokens", [True, True, True]),
    ):
        with np.errstate(divide="ignore"):
            assert parse_expression(text, KNOWN)(values).tolist() == wanted


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tokens >", "which cannot be read"),
        ("suprise < 3", "found the name suprise, expected .*; did you mean surprise"),
        ("suprise < 3 or tokenss > 1 or zz > suprise",
         "the names suprise, tokenss, zz, .*; did you mean surprise for suprise and tokens for"),
        ("__import__('os').system('true')", "expected a comparison"),
        ("tokens.__class__ == 1", "found tokens.__class__, expected a name"),
        ("tokens < f(3)", r"found f\(3\), expected a name"),
        ("tokens < 'a'", "found 'a', expected a name"),
        ("tokens ** 9 < 3", r"found tokens \*\* 9"),
        ("tokens in surprise", "expected a comparison"),
        ("tokens", "found tokens, expected a comparison"),
        ("tokens and surprise > 1", "found tokens, expected a comparison"),
        ("(tokens > 1) + 1 > 2", "found tokens > 1, expected a name"),
        ("tokens > True", "found True, expected a name"),
        ("tokens < 1" + "0" * 400, "expected a name, a number"),
        ("1 < 2", "names none of tokens, surprise"),
        ("[x for x in (1,)]", "expected a comparison"),
        ("tokens > 1" + " or tokens > 1" * 100, "characters, expected at most"),
        ("-" * 900 + "tokens > 0", "more than 100 deep"),
        ("+".join("1" * 450) + " < tokens", "more than 100 deep"),
    ],
)  # fmt: skip
def test_nothing_else_is_said(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_expression(text, KNOWN)


def test_the_setting_is_read_where_it_is_given() -> None:
    assert tuple(ROW_STATISTICS) == _FILTERED_BY
    with pytest.raises(ConfigError, match=r"data\.filter: found the name length, expected one of"):
        parse_command(StudentRun, ["--data.filter", "length > 3"], prog="", description="")
    assert "filter" not in DataSettings().identity()
    assert DataSettings(filter="tokens > 3").identity()["filter"] == "tokens > 3"


def test_statistics_are_those_of_the_decoded_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(str(tmp_path / "cache"))
    cache = open_cache(str(tmp_path / "cache"))
    found = row_statistics(cache, "train", tuple(ROW_STATISTICS))
    rows = list(cache.rows("train"))
    column = cache.manifest.temperatures.index(1.0)
    for r, row in enumerate(rows):
        label_N, entropy_N = row.targets.label_logprob_N, row.targets.entropy_NG[:, column]
        assert found["tokens"][r] == len(row.input_ids_L)
        assert found["loss_tokens"][r] == row.targets.num_positions
        if not row.targets.num_positions:
            assert found["surprise"][r] == found["max_surprise"][r] == found["entropy"][r] == 0
            continue
        assert found["surprise"][r] == pytest.approx(-label_N.mean(), rel=1e-5)
        assert found["max_surprise"][r] == pytest.approx(-label_N.min(), rel=1e-5)
        assert found["entropy"][r] == pytest.approx(entropy_N.mean(), rel=1e-5, abs=1e-6)
        assert found["agreement"][r] == pytest.approx((np.exp(label_N) > 0.5).mean())
        assert 0 <= found["sample"][r] < 1
    # Stored: a second reader opens no shard, and a damaged file is made again.
    monkeypatch.setattr(statistics, "_of_shard", lambda *_: pytest.fail("read again"))
    again = row_statistics(open_cache(str(tmp_path / "cache")), "train", ("surprise",))
    np.testing.assert_array_equal(again["surprise"], found["surprise"])
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "local"))
    (file,) = (tmp_path / "local").rglob("*.npy")
    file.write_bytes(file.read_bytes()[:50])
    left = file.with_name("of-another-cache.npy")
    left.write_bytes(b"")
    os.utime(left, (0, 0))
    again = row_statistics(open_cache(str(tmp_path / "cache")), "train", ("entropy",))
    np.testing.assert_array_equal(again["entropy"], found["entropy"])
    assert not left.exists()


def test_rows_that_meet_the_condition(tmp_path: Path) -> None:
    write_cache(str(tmp_path / "cache"))
    cache = open_cache(str(tmp_path / "cache"))
    every = list(cache.rows("train"))
    wanted = [row.sample_id for row in every if len(row.input_ids_L) >= 20]
    rows, counts = filter_rows(cache.source("train"), cache, "tokens >= 20")
    read = [
        row.sample_id
        for shard, number in enumerate(rows.shard_rows())
        for row in rows.read_rows(shard, range(number))
    ]
    assert read == wanted
    assert 0 < len(wanted) < len(every)
    assert counts.kept_rows == len(wanted)
    assert counts.rows == len(every)
    sizes = np.concatenate([rows.shard_sizes(shard) for shard in range(2)])
    assert counts.kept_loss_tokens == sizes[:, 1].sum()
    assert (sizes[:, 0] >= 20).all()


def test_what_leaves_nothing_or_cannot_be_read_is_refused(tmp_path: Path) -> None:
    write_cache(str(tmp_path / "cache"))
    cache = open_cache(str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"leaves nothing.*which have tokens from 6 to 35"):
        filter_rows(cache.source("train"), cache, "tokens > 1000")
    (tmp_path / "cache" / SHARD).write_bytes(b"")
    with pytest.raises(CacheError, match=r"00001\.parquet: shard damaged"):
        filter_rows(cache.source("train"), cache, "surprise > 0")
    filter_rows(cache.source("train"), cache, "tokens > 3")  # lengths need no shard


def test_each_cache_of_a_mixture_is_filtered_by_what_it_knows(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_cache(str(tmp_path / name))
    shares = [CacheShare(url=str(tmp_path / name), tag=name) for name in ("a", "b")]
    mixture = open_caches(shares)
    rows, counts = filtered_training_rows(mixture.source("train"), mixture, "sample < 0.6")
    assert isinstance(rows, MixedRows)
    assert set(counts) == {"a", "b"}
    assert rows.shard_rows()[:2] == rows.shard_rows()[2:]
    assert sum(rows.shard_rows()) == counts["a"].kept_rows + counts["b"].kept_rows
    with pytest.raises(ConfigError, match="leaves nothing of a"):
        filtered_training_rows(mixture.source("train"), mixture, "sample > 1")
    mean = open_caches(shares, teachers="mean")
    shared, counts = filtered_training_rows(mean.source("train"), mean, "sample < 0.6")
    assert isinstance(shared, FilteredRows)
    assert set(counts) == {""}
    assert shared.read_rows(0, [0])[0].others  # type: ignore[attr-defined]


def test_stored_statistics_of_other_rows_are_not_taken(tmp_path: Path) -> None:
    columns = len(ROW_STATISTICS) - 2
    file = tmp_path / "a.npy"
    assert _load(file, 3) is None
    np.save(file, np.zeros((3, columns), np.float32))
    assert _load(file, 3) is not None
    assert _load(file, 4) is None
    np.save(file, np.zeros((3, columns), np.float64))
    assert _load(file, 3) is None
