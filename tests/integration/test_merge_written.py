"""Parts of a cache whose responses the teacher wrote are merged, and stage one goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import open_cache
from pipeline.cache.tools.verify import verify_cache
from pipeline.corpus.prepared.blocks import TokenisedRow, encode_block
from pipeline.errors import CacheError
from pipeline.storage import Store
from tests.conftest import Stage, Tiny
from tests.responses import RESPONSES, content_digests
from tests.unit.cache.planned_cache import flip, lose


def _encode_otherwise(rows: list[TokenisedRow]) -> bytes:
    """Encode samples to other bytes, as another version of pyarrow may."""
    sink = pa.BufferOutputStream()
    table = pq.read_table(pa.BufferReader(encode_block(rows)))
    pq.write_table(table, sink, compression="none", store_schema=False)
    return bytes(sink.getvalue().to_pybytes())


ANOTHER_VERSION = (
    "hooks",
    ("replace_name", "pipeline.corpus.prepared.folder", "encode_block", _encode_otherwise),
    ("forbid_loading",),
)


def _parts(one: Path, two: Path, tmp_path: Path) -> list[Path]:
    """Copy two caches as workers leave them that wrote every second shard."""
    parts = []
    for number, folder in enumerate((one, two)):
        counts = open_cache(str(folder)).manifest.shard_counts
        keys = [(split, index) for split, count in counts.items() for index in range(count)]
        parts.append(Path(shutil.copytree(folder, tmp_path / f"part{number}")))
        lose(parts[-1], *keys[number::2])
    return parts


def test_what_was_drawn_twice_is_not_merged(
    writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    stage("cache_teacher", [*writing, "--cache_dir", other], hook=("other_draws",)).ok()
    parts = _parts(written, other, tmp_path)
    with pytest.raises(CacheError, match="made from different texts") as error:
        main(["merge", *map(str, parts), str(tmp_path / "sum")])
    assert "00000.parquet: other responses" in error.value.found
    assert not (tmp_path / "sum").exists()
    with pytest.raises(CacheError, match=r"manifest\.json: text "):
        main(["merge", str(written), str(other), str(tmp_path / "sum")])


def test_parts_of_one_text_become_the_cache(
    writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    one, two = _parts(written, written, tmp_path)
    file = one / RESPONSES / "00001.parquet"
    flip(file, file.stat().st_size // 3)
    plan = json.loads((one / RESPONSES / "plan.json").read_text())
    begun = {name: plan[name] for name in ("identity", "identity_digest")}
    (one / RESPONSES / "plan.json").write_text(json.dumps(begun, indent=1))
    (two / RESPONSES / "00000.parquet").unlink()
    shutil.rmtree(two / RESPONSES / "units")
    shutil.rmtree(two / "_meta/corpus")
    target = tmp_path / "sum"
    assert main(["merge", str(one), str(two), str(target)]) == 0
    assert verify_cache(Store(str(target))) == []
    found, wanted = content_digests(target), content_digests(written)
    # Nobody knew the digest of the whole text.
    assert {name for name in found | wanted if found.get(name) != wanted.get(name)} == {
        "_meta/manifest.json"
    }
    counts = open_cache(str(target)).manifest.corpus_counts
    assert counts == open_cache(str(written)).manifest.corpus_counts
    # Stage one knows all of it again, where it would prepare the text to other bytes.
    (target / "_meta/manifest.json").unlink()
    stage("cache_teacher", [*writing, "--cache_dir", target], hook=ANOTHER_VERSION).ok()
    assert content_digests(target) == wanted


def test_the_prepared_corpus_goes_along(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    one, two = _parts(tiny_cache, tiny_cache, tmp_path)
    shutil.rmtree(one / "_meta/corpus")
    target = tmp_path / "sum"
    assert main(["merge", str(one), str(two), str(target)]) == 0
    (target / "_meta/manifest.json").unlink()
    stage("cache_teacher", [*tiny.stage_one, "--cache_dir", target], hook=ANOTHER_VERSION).ok()
    assert content_digests(target) == content_digests(tiny_cache)
