"""Caches on the hub: pushed in commits, the manifest in the last one; read in place; pulled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import open_cache
from pipeline.cache.tools.travel import hub as travel_hub
from pipeline.cache.tools.verify import verify_cache
from pipeline.errors import CacheError, ConfigError, StoreError
from pipeline.storage import Store
from pipeline.storage import hub as storage_hub
from tests.hub_dataset_server import HubDatasets, serve_datasets, use_hub
from tests.unit.cache.sample_cache import SHARD, read_all

URL = "hf://datasets/me/cache"
_PUSH = ["--license", "apache-2.0"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDatasets]:
    with serve_datasets() as served:
        use_hub(monkeypatch, served)
        monkeypatch.setattr(storage_hub.time, "sleep", lambda _: None)
        yield served


def test_pushed_read_in_place_and_pulled(
    hub: HubDatasets, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.failing = [503]
    assert main(["push", str(cache_dir), URL, *_PUSH, "--private"]) == 0
    assert "compared on arrival, under apache-2.0" in capsys.readouterr().out
    files = hub.repositories["me/cache"]
    assert files[SHARD] == (cache_dir / SHARD).read_bytes()
    assert b"license: apache-2.0" in files["README.md"]
    assert hub.private["me/cache"] is True
    assert hub.tokens == {"Bearer hf_test"}
    assert hub.commits[-1][1] == ["README.md", "_meta/manifest.json"]
    assert all("_meta/manifest.json" not in names for _, names in hub.commits[:-1])
    # In place, by the storage's own adapter.
    remote, local = open_cache(URL), open_cache(str(cache_dir))
    assert remote.manifest == local.manifest
    for one, other in zip(read_all(remote), read_all(local), strict=True):
        assert one.sample_id == other.sample_id
        assert one.targets.logprobs_E.tolist() == other.targets.logprobs_E.tolist()
    assert verify_cache(Store(URL)) == []
    assert open_cache(f"{URL}@main").manifest == local.manifest
    assert main(["pull", URL, str(tmp_path / "back")]) == 0
    assert (tmp_path / "back/README.md").read_bytes() == files["README.md"]
    assert verify_cache(Store(str(tmp_path / "back")), check="decode") == []
    before = len(hub.commits)
    assert main(["push", str(cache_dir), URL, *_PUSH]) == 0
    assert main(["push", str(cache_dir), URL, "--license", "mit"]) == 0
    assert [names for _, names in hub.commits[before:]] == [["README.md"]]
    (cache_dir / "_meta/corpus/units").mkdir(parents=True)
    (cache_dir / "_meta/corpus/units/0.parquet").write_bytes(b"text")
    assert main(["push", str(cache_dir), URL, *_PUSH, "--with-corpus"]) == 0
    assert "_meta/corpus/units/0.parquet" in hub.repositories["me/cache"]
    assert main(["push", str(cache_dir), URL, "--license", "mit"]) == 0, "it is this cache's still"


def test_a_push_goes_on_where_it_stopped(
    hub: HubDatasets, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(travel_hub, "_COMMIT_FILES", 2)
    hub.failing = []
    sent: list[int] = []
    real = storage_hub.HubDataset.commit

    def commit(self: storage_hub.HubDataset, files: dict[str, bytes], message: str) -> None:
        if len(sent) == 2:
            hub.failing = [403]  # the right to write is withdrawn
        sent.append(len(files))
        real(self, files, message)

    monkeypatch.setattr(storage_hub.HubDataset, "commit", commit)
    with pytest.raises(
        StoreError, match=r"the hub does not take it .*what has arrived is not sent"
    ):
        main(["push", str(cache_dir), URL, *_PUSH])
    assert "_meta/manifest.json" not in hub.repositories["me/cache"]
    there = {name for _, names in hub.commits for name in names}
    assert len(there) == 4
    with pytest.raises(CacheError):
        open_cache(URL)
    monkeypatch.setattr(storage_hub.HubDataset, "commit", real)
    main(["push", str(cache_dir), URL, *_PUSH])
    assert not there & {name for _, names in hub.commits[2:] for name in names}
    assert verify_cache(Store(URL)) == []


def test_what_arrives_otherwise_is_found_out(hub: HubDatasets, cache_dir: Path) -> None:
    hub.keep_wrong = SHARD
    with pytest.raises(StoreError, match="1 files are not there as they were sent, such as data"):
        main(["push", str(cache_dir), URL, *_PUSH])
    assert "_meta/manifest.json" not in hub.repositories["me/cache"]
    main(["push", str(cache_dir), URL, *_PUSH])
    assert hub.repositories["me/cache"][SHARD] == (cache_dir / SHARD).read_bytes()


def test_a_data_set_with_another_cache_is_left_alone(hub: HubDatasets, cache_dir: Path) -> None:
    hub.repositories["me/cache"] = {"data/train/00007.parquet": b"x", "notes.md": b"mine"}
    with pytest.raises(CacheError, match="files of another cache, such as data/train/00007"):
        main(["push", str(cache_dir), URL, *_PUSH])
    hub.repositories["me/cache"] = {"_meta/manifest.json": b"{}"}
    with pytest.raises(CacheError, match=r"such as _meta/manifest\.json"):
        main(["push", str(cache_dir), URL, *_PUSH])
    assert not hub.commits
    # Several caches of one data set lie in folders of it.
    main(["push", str(cache_dir), f"{URL}/eight-b", *_PUSH])
    assert verify_cache(Store(f"{URL}/eight-b")) == []


def test_a_push_without_a_token_or_to_no_data_set(
    hub: HubDatasets, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="found no --license"):
        main(["push", str(cache_dir), URL])
    with pytest.raises(ConfigError, match="names no data set of the hub"):
        main(["push", str(cache_dir), "hf://me/cache", *_PUSH])
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="needs a token, and there is none; expected HF_TOKEN"):
        main(["push", str(cache_dir), URL, *_PUSH])
    with pytest.raises(ConfigError, match="2 mistakes") as caught:
        main(["push", str(cache_dir), URL])
    assert "needs a token" in str(caught.value)
    assert "found no --license" in str(caught.value)
    assert not hub.repositories
    assert not hub.commits


def test_the_hub_is_not_written_in_place(hub: HubDatasets, cache_dir: Path) -> None:
    hub.repositories["me/cache"] = {"x": b"x"}
    store = Store(URL)
    for act in (
        lambda: store.write("y", b"y"),
        lambda: store.create("y", b"y"),
        lambda: store.delete("x"),
    ):
        with pytest.raises(StoreError, match="read in place, not written in place"):
            act()
    with pytest.raises(StoreError, match="not written in place"):
        main(["pull", str(cache_dir), URL])
    assert hub.repositories["me/cache"] == {"x": b"x"}


def test_an_answer_that_does_not_pass_is_told_at_once(
    hub: HubDatasets, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["push", str(cache_dir), URL, *_PUSH])
    hub.reading = [403]
    hub.reads.clear()
    with pytest.raises(StoreError, match=r"cannot read _meta/manifest\.json"):
        open_cache(URL)
    assert len(hub.reads) == 1
    with pytest.raises(CacheError, match="no cache there"):
        open_cache("hf://datasets/me/nothing")
