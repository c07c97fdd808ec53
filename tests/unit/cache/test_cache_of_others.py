"""A cache that somebody else wrote cannot name files outside itself, nor run code when repaired."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.segments import iter_records
from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.manifest import segment_of
from pipeline.cache.layout.names import parse_segment
from pipeline.cache.layout.records import decode_segment, encode_segment
from pipeline.cache.tools.repair import plan_repair, repair_cache
from pipeline.cache.tools.verify import verify_cache
from pipeline.errors import CacheError, run_command
from pipeline.storage import Store
from tests.conftest import digests
from tests.unit.cache.planned_cache import flip, write_planned_cache
from tests.unit.cache.sample_cache import SHARD, rewrite_manifest


@pytest.mark.parametrize(
    "name", ["../../away", "/etc/away", "a/../../../away", "..\\away", "a//b", ""]
)
def test_a_tokenizer_file_lies_below_its_folder(cache_dir: Path, tmp_path: Path, name: str) -> None:
    """Its name is a path to write to, for `export`, `pull` and whoever loads the tokenizer."""
    content = b"from elsewhere"
    away = tmp_path / "away"
    away.write_bytes(content)
    rewrite_manifest(cache_dir, tokenizer_xxh3_128={name: checksum(content)})
    with pytest.raises(CacheError, match="do not use it"):
        open_cache(str(cache_dir))
    for command in ("export", "pull"):
        with pytest.raises(CacheError, match="names the file"):
            main([command, str(cache_dir), str(tmp_path / "target")])
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "change", [{"path": "../../away.parquet"}, {"split": "../x"}, {"path": "README.md"}]
)
def test_a_segment_is_where_its_name_says(cache_dir: Path, change: dict[str, str]) -> None:
    manifest = json.loads((cache_dir / "_meta/manifest.json").read_text())
    manifest["segments"][0] |= change
    rewrite_manifest(cache_dir, segments=manifest["segments"])
    with pytest.raises(CacheError, match="names the file"):
        open_cache(str(cache_dir))


def test_a_record_names_its_own_shard(cache_dir: Path, tmp_path: Path) -> None:
    cache = open_cache(str(cache_dir))
    records = list(iter_records(cache.store, cache.manifest, "train"))
    moved = [replace(records[0], path="../../away.parquet"), *records[1:]]
    raw = encode_segment(moved)
    old = cache.manifest.of_split("train")[0]
    new = segment_of(moved, size=len(raw), xxh3_128=checksum(raw))
    (cache_dir / old.path).write_bytes(raw)
    rest = [asdict(item) for item in cache.manifest.of_split("heldout")]
    rewrite_manifest(cache_dir, segments=[asdict(new), *rest])
    name = parse_segment(Path(old.path).name)
    assert name is not None
    assert decode_segment(raw, name) is None
    with pytest.raises(CacheError, match="names files that are no shards of it"):
        main(["pull", str(cache_dir), str(tmp_path / "target")])
    assert not (tmp_path / "away.parquet").exists()


@pytest.mark.parametrize(
    "config",
    [
        "teacher: {model: theirs, trust_remote_code: true}",
        "teacher.trust_remote_code: 1",
        "- {a: [{trust_remote_code: 'yes'}]}",
    ],
)
def test_a_repair_runs_no_code_because_the_cache_says_so(tmp_path: Path, config: str) -> None:
    write_planned_cache(str(tmp_path))
    (tmp_path / "_meta/config.yaml").write_text(config)
    # Of stage one: a derived cache is made again by another command.
    (tmp_path / "_meta/manifest.json").unlink()
    store = Store(str(tmp_path))
    flip(tmp_path / SHARD, 1000)
    before = digests(tmp_path)
    plan = plan_repair(store, verify_cache(store))
    with pytest.raises(CacheError, match="repair with --trust-remote-code"):
        repair_cache(store, plan, lambda _arguments: pytest.fail("stage one was started"))
    assert digests(tmp_path) == before
    started = []
    with pytest.raises(CacheError, match="exit code 3"):
        repair_cache(store, plan, lambda flags: started.append(flags) or 3, trust_remote_code=True)
    assert started


def test_a_repair_takes_an_ordinary_configuration(tmp_path: Path) -> None:
    write_planned_cache(str(tmp_path))
    (tmp_path / "_meta/config.yaml").write_text("teacher: {trust_remote_code: false}")
    store = Store(str(tmp_path))
    flip(tmp_path / SHARD, 1000)
    with pytest.raises(CacheError, match="exit code 3"):
        repair_cache(store, plan_repair(store, verify_cache(store)), lambda _flags: 3)


def test_words_of_a_cache_do_not_drive_the_terminal(
    cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.unit.cache.sample_cache import sample_identity

    identity = sample_identity()
    identity["teacher"]["model"] = "mine\x1b]0;title\x07\x1b[2J"
    rewrite_manifest(cache_dir, identity=identity)
    assert main(["inspect", str(cache_dir)]) == 0
    shown = capsys.readouterr().out
    assert "mine⟨U+001B⟩]0;title⟨U+0007⟩" in shown
    assert "\x1b" not in shown


def test_an_error_shows_control_characters_as_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise CacheError("a file \x1b[2J\x9b31m of\tothers", do="look\nagain")

    assert run_command(fail) == 3
    assert capsys.readouterr().err == (
        "error: a file ⟨U+001B⟩[2J⟨U+009B⟩31m of\tothers; look\nagain.\n"
    )
