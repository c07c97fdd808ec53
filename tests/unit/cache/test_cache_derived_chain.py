"""Caches derived from derived caches: repeats, written responses, linked sources."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.writer import commit_shard
from pipeline.cache.tools.derive import check_apart
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
    assert main(["merge", str(one), str(two), str(tmp_path / "sum")]) == 0
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
    assert main(["merge", str(one), str(two), str(tmp_path / "sum")]) == 0
    _whole(tmp_path / "sum")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "sum")]) == 0
    out = capsys.readouterr().out
    assert "written by the teacher itself" in out
    assert "at most 14 tokens each" in out
    assert ("2 sampling settings" in out) == (other == "other settings")
    # The sources hold the text, the merged cache does not.
    assert "_meta/responses" not in out + (tmp_path / "sum/README.md").read_text()


SPELLINGS = {
    "itself": "{one}",
    "a slash behind it": "{one}/",
    "within": "{one}/plain",
    "around": "{above}",
    "dots": "{one}/../{name}",
    "dots within": "{above}/nowhere/../{name}/_meta/plain",
    "a URL": "file://{one}",
    "a URL with dots": "file://{one}/data/../plain/",
    "another URL": "local://{one}/plain",
    "a link": "{link}",
    "within a link": "{link}/plain",
    "a URL of a link": "file://{link}/",
    "a link above": "{linked_above}/{name}/plain",
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("command", ["merge", "slice", "export"])
def test_a_source_is_no_target_however_it_is_spelt(
    command: str, spelling: str, made_once: Path
) -> None:
    one, two = made_once / "above/1", made_once / "2"
    before = digests(made_once)
    target = spelling.format(
        one=one, above=one.parent, name=one.name,
        link=made_once / "link", linked_above=made_once / "linked_above",
    )  # fmt: skip
    arguments = {
        "merge": ["merge", str(two), str(one), target],
        "slice": ["slice", str(one), target, "--samples", "3"],
        "export": ["export", str(one), target],
    }[command]
    with pytest.raises(CacheError, match="apart from the sources"):
        main(arguments)
    assert digests(made_once) == before


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the caches `above/1` and `2`, and links to one and to `above`."""
    folder = tmp_path_factory.mktemp("spelt")
    one = _write(folder / "above/1", "A")
    shutil.copytree(one, folder / "2")
    (folder / "link").symlink_to(one)
    (folder / "linked_above").symlink_to(one.parent)
    return folder


def test_a_source_named_twice_is_seen_however_it_is_spelt(made_once: Path, tmp_path: Path) -> None:
    one = made_once / "above/1"
    for again in (f"{one}/", f"file://{one}", str(made_once / "link"), f"{one}/../1"):
        with pytest.raises(CacheError, match="a cache is named twice"):
            main(["merge", str(one), again, str(tmp_path / "sum")])


def test_stores_of_two_kinds_share_nothing() -> None:
    """The same path in two buckets of two providers, or in memory, is not the same folder."""
    one, two = Store("memory://bucket/a"), Store("s3://bucket/a")
    assert one.place != two.place
    check_apart(one, [two])
    with pytest.raises(CacheError, match="apart from the sources"):
        check_apart(Store("s3://bucket/a/b/"), [two])
    check_apart(Store("s3://bucket/ab"), [two])  # a name that begins alike is another


def test_a_link_to_a_source_is_no_target(tmp_path: Path) -> None:
    one = _write(tmp_path / "1", "A")
    two, before = shutil.copytree(one, tmp_path / "2"), digests(one)
    (tmp_path / "link").symlink_to(one)
    with pytest.raises(CacheError, match="apart from the sources"):
        main(["merge", str(one), str(two), str(tmp_path / "link")])
    with pytest.raises(CacheError, match="apart from the sources"):
        main(["export", str(one), str(tmp_path / "link/plain")])
    assert digests(one) == before
