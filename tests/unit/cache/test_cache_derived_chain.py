"""Caches derived from derived caches: repeats, written responses, linked sources."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.writer import commit_shard
from pipeline.cache.tools.verify import verify_cache
from pipeline.errors import CacheError
from pipeline.storage import Store
from tests.conftest import digests
from tests.unit.cache.sample_cache import SIZES, finish, read_all, sample_identity, sample_shard

SAMPLED = {"temperature": 0.9, "top_p": 1, "top_k": 0, "min_p": 0, "max_new_tokens": 14}


def _write(folder: Path, name: str, corpus: dict[str, Any] | None = None) -> Path:
    """Write the sample cache as if by teacher `name`."""
    identity = sample_identity(teacher={**sample_identity()["teacher"], "model": name})
    if corpus is not None:
        identity["corpus"] = corpus
    store, records = Store(str(folder)), []
    for split, index, number in SIZES:
        record, data = sample_shard(split, index, number, identity=identity)
        commit_shard(store, record, data)
        records.append(record)
    finish(store, records, identity)
    return folder


def _whole(folder: Path) -> None:
    assert verify_cache(Store(str(folder))) == []


def test_a_merged_cache_is_sliced_with_its_repeats(tmp_path: Path) -> None:
    one, two = _write(tmp_path / "1", "A"), _write(tmp_path / "2", "B")
    assert main(["merge", str(tmp_path / "sum"), str(one), str(two)]) == 0
    for flags in (["--samples", "9"], ["--top-k", "2"], ["--split", "heldout"]):
        target = tmp_path / flags[0]
        assert main(["slice", str(tmp_path / "sum"), str(target), *flags]) == 0
        _whole(target)
        cache = open_cache(str(target))
        names = [row.sample_id for row in read_all(cache)]
        # A sample counts once, with each teacher's row of it.
        assert len(names) == 2 * len(set(names))
        assert cache.manifest.identity["derived"]["repeated_samples"] == len(set(names))
    assert len({row.sample_id for row in read_all(open_cache(str(tmp_path / "--samples")))}) == 9
    with pytest.raises(CacheError, match="holds 10 samples"):
        main(["slice", str(tmp_path / "sum"), str(tmp_path / "x"), "--samples", "11"])


@pytest.mark.parametrize("other", ["other settings", "the same settings", "not written"])
def test_teachers_that_wrote_their_responses(
    other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus: dict[str, Any] = {"source": "prompts", "seed": 1, "max_length": 9}
    one = _write(tmp_path / "1", "A", {**corpus, "generate": SAMPLED})
    second = dict(corpus)
    if other != "not written":
        sampled = {**SAMPLED, "temperature": 0.5} if other == "other settings" else SAMPLED
        second |= {"generate": sampled}
    two = _write(tmp_path / "2", "B", second)
    assert main(["merge", str(tmp_path / "sum"), str(one), str(two)]) == 0
    _whole(tmp_path / "sum")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "sum")]) == 0
    out = capsys.readouterr().out
    assert "written by the teacher itself" in out
    assert "at most 14 tokens each" in out
    assert ("2 sampling settings" in out) == (other == "other settings")
    # The sources hold the text, the merged cache does not.
    assert "_meta/responses" not in out + (tmp_path / "sum/README.md").read_text()


def test_a_link_to_a_source_is_no_target(tmp_path: Path) -> None:
    one = _write(tmp_path / "1", "A")
    two, before = shutil.copytree(one, tmp_path / "2"), digests(one)
    (tmp_path / "link").symlink_to(one)
    with pytest.raises(CacheError, match="apart from the sources"):
        main(["merge", str(tmp_path / "link"), str(one), str(two)])
    with pytest.raises(CacheError, match="apart from the sources"):
        main(["export", str(one), str(tmp_path / "link/plain")])
    assert digests(one) == before
