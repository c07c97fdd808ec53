"""Caches that travel between stores: resumed, compared on arrival, licensed; the manifest last."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import open_cache
from pipeline.cache.tools.verify import verify_cache
from pipeline.errors import CacheError, ConfigError, StoreError
from pipeline.storage import Store
from tests.unit.cache.sample_cache import SHARD, sample_identity, write_cache
from tests.unit.storage import conftest as storage_fixtures

s3_endpoint = storage_fixtures.s3_endpoint
bucket = storage_fixtures.bucket
store = storage_fixtures.store

_LICENCE = ["--license", "apache-2.0", "--teacher-terms", "outputs may train other models"]


def _front(card: bytes) -> dict[str, Any]:
    return dict(yaml.safe_load(card.decode().split("---")[1]))


def test_there_and_back_to_every_kind_of_store(
    cache_dir: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache_dir / "_meta/corpus/units").mkdir(parents=True)
    (cache_dir / "_meta/corpus/units/0.parquet").write_bytes(b"text")
    (cache_dir / "_meta/leases").mkdir()
    (cache_dir / "_meta/leases/stale").write_bytes(b"x")
    assert main(["push", str(cache_dir), store.url, *_LICENCE]) == 0
    assert "every byte compared on arrival, under apache-2.0" in capsys.readouterr().out
    assert main(["pull", store.url, str(tmp_path / "back")]) == 0
    for name in ("_meta/manifest.json", SHARD, "_meta/tokenizer/tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (cache_dir / name).read_bytes()
    assert verify_cache(Store(str(tmp_path / "back")), check="decode") == []
    assert not (tmp_path / "back/_meta/corpus").exists()
    assert not (tmp_path / "back/_meta/leases").exists()
    assert not (tmp_path / "back/_meta/transfer.json").exists()
    card = (tmp_path / "back/README.md").read_bytes()
    assert _front(card)["license"] == "apache-2.0"
    assert _front(card)["configs"], "where `load_dataset` finds the splits"
    assert b"outputs may train other models." in card
    # Once more: nothing is sent, and the licence can be stated anew.
    assert main(["push", str(cache_dir), store.url, "--license", "mit"]) == 0
    assert "0 files of 0 bytes sent" in capsys.readouterr().out
    text = store.read("README.md").decode()
    assert _front(text.encode())["license"] == "mit"
    assert text.count("## Licence and terms") == 1


def test_the_prepared_corpus_comes_along_where_it_is_asked_for(
    cache_dir: Path, tmp_path: Path
) -> None:
    (cache_dir / "_meta/corpus/units").mkdir(parents=True)
    (cache_dir / "_meta/corpus/units/0.parquet").write_bytes(b"text")
    main(["pull", str(cache_dir), str(tmp_path / "copy"), "--with-corpus"])
    assert (tmp_path / "copy/_meta/corpus/units/0.parquet").read_bytes() == b"text"


@pytest.mark.parametrize("broken", [1, 3, 5])
def test_an_interrupted_transfer_looks_unfinished_and_goes_on(
    broken: int, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "copy"
    real: Callable[..., None] = Store.write
    written: list[str] = []

    def write(self: Store, name: str, data: bytes, **options: Any) -> None:
        if self.url == str(target):
            if len(written) == broken:
                raise StoreError("the power went")
            written.append(name)
        real(self, name, data, **options)

    monkeypatch.setattr(Store, "write", write)
    command = ["pull", str(cache_dir), str(target), "--workers", "1"]
    with pytest.raises(StoreError, match="the power went"):
        main(command)
    assert not (target / "_meta/manifest.json").exists()
    with pytest.raises(CacheError):
        open_cache(str(target))
    done = set(written)
    monkeypatch.setattr(Store, "write", real)
    ages = {name: (target / name).stat().st_mtime_ns for name in done}
    main(command)
    assert {name: (target / name).stat().st_mtime_ns for name in done} == ages
    assert verify_cache(Store(str(target))) == []


def test_what_differs_at_the_target_is_sent_again(cache_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    main(["pull", str(cache_dir), str(target)])
    data = (target / SHARD).read_bytes()
    (target / SHARD).write_bytes(data[:-1] + b"\x00")
    main(["pull", str(cache_dir), str(target), "--check", "size"])
    assert (target / SHARD).read_bytes() != data
    main(["pull", str(cache_dir), str(target)])
    assert (target / SHARD).read_bytes() == data


def test_killed_while_it_replaces_a_file_it_goes_on(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "copy"
    main(["pull", str(cache_dir), str(target)])
    data = (target / SHARD).read_bytes()
    (target / SHARD).write_bytes(data[:-1] + b"\x00")
    real: Callable[..., None] = Store.write

    def write(self: Store, name: str, data: bytes, **options: Any) -> None:
        if name == SHARD:
            raise StoreError("the power went")
        real(self, name, data, **options)

    monkeypatch.setattr(Store, "write", write)
    with pytest.raises(StoreError, match="the power went"):
        main(["pull", str(cache_dir), str(target)])
    assert not (target / "_meta/manifest.json").exists()
    monkeypatch.setattr(Store, "write", real)
    main(["pull", str(cache_dir), str(target)])
    assert verify_cache(Store(str(target))) == []
    assert not list(target.glob("_meta/*transfer*"))


def test_a_store_that_keeps_other_bytes_is_found_out(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Store.write

    def write(self: Store, name: str, data: bytes, **options: Any) -> None:
        real(self, name, data[:-1] + b"\x00" if name == SHARD else data, **options)

    monkeypatch.setattr(Store, "write", write)
    with pytest.raises(StoreError, match=r"train/00001\.parquet: what is there is not what"):
        main(["pull", str(cache_dir), str(tmp_path / "copy")])
    assert not (tmp_path / "copy/_meta/manifest.json").exists()


def test_a_damaged_source_is_not_spread(cache_dir: Path, tmp_path: Path) -> None:
    data = (cache_dir / SHARD).read_bytes()
    (cache_dir / SHARD).write_bytes(data[:-1] + b"\x00")
    with pytest.raises(CacheError, match=r"damaged .*repair it first"):
        main(["pull", str(cache_dir), str(tmp_path / "copy")])
    assert not (tmp_path / "copy/_meta/manifest.json").exists()
    assert not (tmp_path / "copy" / SHARD).exists()


def test_another_cache_is_never_written_over(cache_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_cache(str(other))
    (other / "_meta/manifest.json").unlink()
    with pytest.raises(CacheError, match=r"holds another cache \(unfinished"):
        main(["pull", str(cache_dir), str(other)])
    begun = tmp_path / "begun"
    (begun / "_meta").mkdir(parents=True)
    (begun / "_meta/transfer.json").write_text(json.dumps({"manifest_xxh3_128": "0" * 32}))
    with pytest.raises(CacheError, match="a transfer of another one has begun"):
        main(["pull", str(cache_dir), str(begun)])
    with pytest.raises(CacheError, match="apart from the sources"):
        main(["pull", str(cache_dir), str(cache_dir / "copy")])
    whole = tmp_path / "whole"
    write_cache(str(whole))
    manifest = json.loads((whole / "_meta/manifest.json").read_text())
    from tests.unit.cache.sample_cache import rewrite_manifest

    rewrite_manifest(whole, identity=sample_identity(shard_tokens=7))
    assert manifest["identity"]["shard_tokens"] != 7
    with pytest.raises(CacheError, match="shard_tokens: 7 there"):
        main(["pull", str(cache_dir), str(whole)])


def test_a_push_needs_a_licence(cache_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "published"
    with pytest.raises(ConfigError, match="push: found no --license; expected the licence"):
        main(["push", str(cache_dir), str(target)])
    with pytest.raises(ConfigError, match="2 mistakes") as caught:
        main(["push", str(cache_dir), str(target), "--license", "other", "--license-link", "a b"])
    assert "--license other: found no --license-name" in str(caught.value)
    with pytest.raises(ConfigError, match="them with an address of the hub alone"):
        main(["push", str(cache_dir), str(target), *_LICENCE, "--private"])
    assert not target.exists()
    flags = ["--license", "other", "--license-name", "in-house", "--license-link", "LICENSE.md"]
    main(["push", str(cache_dir), str(target), *flags])
    front = _front((target / "README.md").read_bytes())
    assert (front["license"], front["license_name"], front["license_link"]) == (
        "other", "in-house", "LICENSE.md",
    )  # fmt: skip
    assert b"not stated; read them before" in (target / "README.md").read_bytes()
