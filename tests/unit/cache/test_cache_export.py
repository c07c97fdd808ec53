"""The plain export holds what the cache decodes to, for readers without its codec."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.cache.__main__ import main
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.reader import open_cache
from pipeline.errors import CacheError
from pipeline.sampling.quantisation import rounding_log_bias

READER = Path(__file__).with_name("plain_reader.py")
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


def _sums(row: CachedSequence) -> tuple[list[float], list[float]]:
    """Return what `plain_reader.py` computes, from the decoded row."""
    targets = row.targets
    owner_E = np.repeat(np.arange(targets.num_positions), targets.counts_N)
    sums: tuple[list[float], list[float]] = ([], [])
    for g, temperature in enumerate(targets.temperatures):
        p_E = np.exp(targets.logprobs_E.astype(np.float64) / temperature
                     - targets.log_z_NG[owner_E, g])  # fmt: skip
        if targets.inclusion_E is not None:
            bias = rounding_log_bias(targets.sampled_step, temperature)
            p_E = np.where(targets.inclusion_E < 1, p_E * np.exp(-bias), p_E) / targets.inclusion_E
        for into, factor_E in zip(sums, (1.0, np.sin(targets.token_ids_E + 1.0)), strict=True):
            into += np.bincount(owner_E, p_E * factor_E, targets.num_positions).tolist()
    return sums


def test_programs_without_this_project_compute_what_the_cache_says(tmp_path: Path) -> None:
    """Both splits of every golden cache, by `datasets` and pyarrow in a process of their own."""
    caches = sorted(GOLDEN.parent.glob("cache-v1-*/"))
    for cache in caches:
        assert main(["export", str(cache), str(tmp_path / cache.name)]) == 0
    done = subprocess.run(
        [sys.executable, "-I", str(READER), *(str(tmp_path / cache.name) for cache in caches)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for folder in caches:
        cache = open_cache(str(folder))
        theirs = found[str(tmp_path / folder.name)]
        assert sorted(theirs) == ["heldout", "train"]
        # Held-out rows of a top-k cache have a sampled tail, which an export leaves out.
        tail_left_out = cache.rule is None and cache.heldout_rule is not None
        for split, rows in theirs.items():
            top_k = 10_000 if tail_left_out and split == "heldout" else None
            of_cache = cache.rows(split, top_k=top_k)
            for got, row in zip(rows, of_cache, strict=True):
                weights, gradients = _sums(row)
                np.testing.assert_allclose(got["weights"], weights, rtol=1e-5)
                np.testing.assert_allclose(got["gradients"], gradients, rtol=1e-5, atol=1e-6)
                targets = row.targets
                assert got["sample_id"] == row.sample_id
                assert got["tokens"] == row.input_ids_L[row.loss_mask_L].tolist()
                assert got["label_logprob"] == targets.label_logprob_N.tolist()
                assert got["entropy"] == targets.entropy_NG.tolist()
                written = targets.written_logprob_N
                assert got["written"] == (None if written is None else written.tolist())
                assert sum(got["requested"]) == (
                    0 if targets.requested_E is None else targets.requested_E.sum()
                )


def _card(folder: Path) -> tuple[dict[str, object], str]:
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_the_card_carries_the_licence_that_the_cache_states(tmp_path: Path) -> None:
    stated = ["--license", "other", "--license-name", "in-house", "--teacher-terms", "ask: us"]
    assert main(["push", str(GOLDEN), str(tmp_path / "cache"), *stated]) == 0
    assert main(["export", str(tmp_path / "cache"), str(tmp_path / "plain")]) == 0
    front, text = _card(tmp_path / "plain")
    assert (front["license"], front["license_name"]) == ("other", "in-house")
    assert "| licence | other (in-house) |" in text
    assert text.count("## Licence and terms") == 1
    assert "for its outputs: ask: us." in text
    assert main(["export", str(GOLDEN), str(tmp_path / "unstated")]) == 0
    front, text = _card(tmp_path / "unstated")
    assert "license" not in front
    assert "licence | not stated" in text
    assert "Licence and terms" not in text


def test_other_data_is_not_taken_for_exported_shards(tmp_path: Path) -> None:
    data = tmp_path / "data/train/00000.parquet"
    data.parent.mkdir(parents=True)
    data.write_bytes(b"of somebody else")
    with pytest.raises(CacheError, match=r"holds data/train/00000\.parquet, which no export"):
        main(["export", str(GOLDEN), str(tmp_path)])
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [data]
    assert data.read_bytes() == b"of somebody else"


def test_the_card_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it an export is unfinished, and the same command goes on."""
    from pipeline.storage import Store

    write = Store.write

    def failing(store: Store, name: str, data: bytes) -> None:
        if name.startswith("data/heldout"):
            raise KeyboardInterrupt
        write(store, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            main(["export", str(GOLDEN), str(tmp_path)])
    assert not (tmp_path / "README.md").exists()
    assert main(["export", str(GOLDEN), str(tmp_path)]) == 0
    assert (tmp_path / "data/heldout/00000.parquet").exists()
    assert (tmp_path / "README.md").exists()
