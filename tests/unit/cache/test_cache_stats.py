"""`stats` prints what numpy computes from the decoded rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import open_cache
from pipeline.cache.tools.stats import Tally, cache_stats
from pipeline.errors import CacheError
from tests.unit.cache.planned_cache import flip
from tests.unit.cache.sample_cache import SHARD, SPEC


def _quantile(values: np.ndarray, q: float) -> float:
    return float(np.quantile(values, q, method="inverted_cdf"))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_number_is_that_of_the_rows(made: Path, split: str) -> None:
    cache = open_cache(str(made))
    source = cache.source(split)
    rows = [r for s, n in enumerate(source.shard_rows()) for r in source.read_rows(s, range(n))]
    files = [made / record.path for record in source.shards]
    codes = [b"".join(pq.read_table(f)["tail"].to_pylist()) for f in files]
    tails = SPEC.quantisation.tail_values()[np.frombuffer(b"".join(codes), np.uint8)]
    tails = (1 - (1 - tails.astype(np.float64))).astype(np.float16).astype(np.float64)
    counts = np.concatenate([row.targets.counts_N for row in rows])
    entropy = np.concatenate([row.targets.entropy_NG[:, 0] for row in rows])
    entropy = entropy.astype(np.float16).astype(np.float64)
    label = np.concatenate([row.targets.label_logprob_N for row in rows])
    kept = 0
    for row in rows:
        start = 0
        labels = row.input_ids_L[row.loss_mask_L]
        for token, count in zip(labels.tolist(), row.targets.counts_N.tolist(), strict=True):
            kept += token in row.targets.token_ids_E[start : start + count].tolist()
            start += count
    got: dict[str, Any] = cache_stats(cache, workers=2)["splits"][split]
    assert got["rows"] == len(rows)
    assert got["tokens"] == sum(row.input_ids_L.size for row in rows)
    assert got["loss_tokens"] == counts.size
    assert got["entries_per_position"] == {
        "mean": pytest.approx(counts.mean()),
        "p50": _quantile(counts, 0.5),
        "p95": _quantile(counts, 0.95),
        "max": counts.max(),
    }
    assert got["kept_mass"]["mean"] == pytest.approx(1 - tails.mean())
    assert got["kept_mass"]["p5"] == pytest.approx(1 - _quantile(tails, 0.95))
    assert got["entropy_nats"]["mean"] == pytest.approx(entropy.mean(dtype=np.float64))
    for q in (5, 50, 95):
        assert got["entropy_nats"][f"p{q}"] == _quantile(entropy, q / 100)
    assert got["teacher_cross_entropy"] == pytest.approx(-label.mean(dtype=np.float64))
    assert got["label_within_entries"] == pytest.approx(kept / counts.size)
    sizes = got["bytes_per_loss_token"]
    assert set(sizes) == {"all", *pq.read_schema(files[0]).names}
    total = sum(file.stat().st_size for file in files)
    # The columns are the file but for its footer and magic bytes.
    assert 0.1 * total < sizes["all"] * counts.size < total
    assert sizes["all"] == pytest.approx(sum(v for k, v in sizes.items() if k != "all"))


def test_the_label_share_sees_a_label_token_and_its_absence(made: Path) -> None:
    """Hardly any of the sample cache's random labels is an entry; make one an entry by hand."""
    from dataclasses import replace

    from pipeline.cache.io.writer import encode_shard
    from tests.unit.cache.sample_cache import SPEC, TEMPERATURES, sample_rows

    rows, tails = sample_rows(3, seed=5)
    at, seen = 0, 0
    labels = rows[0].input_ids_L.copy()
    for n, place in enumerate(np.flatnonzero(rows[0].loss_mask_L)):
        count = int(rows[0].targets.counts_N[n])
        inside = count > 0 and n % 2 == 0
        labels[place] = rows[0].targets.token_ids_E[at] if inside else 0
        taken = rows[0].targets.token_ids_E[at : at + count]
        seen += int(labels[place] in taken.tolist())
        at += count
    row = replace(rows[0], input_ids_L=labels)
    _, data = encode_shard(
        [row], SPEC, split="train", index=0, temperatures=TEMPERATURES, identity_digest="x",
        tails=tails[:1],
    )  # fmt: skip
    from pipeline.cache.io.tables import table_from_bytes
    from pipeline.cache.tools.stats import _count

    assert seen > 1
    assert _count(table_from_bytes(data, None), at_one=0).label_kept == seen


def test_totals_are_the_sum_of_the_shards(made: Path) -> None:
    facts = cache_stats(open_cache(str(made)))
    train = [s for s in facts["shards"] if "train" in s["shard"]]
    assert len(facts["shards"]) == 3
    whole = facts["splits"]["train"]
    assert whole["tokens"] == sum(s["tokens"] for s in train)
    weights = [s["loss_tokens"] for s in train]
    for name in ("teacher_cross_entropy", "label_within_entries"):
        assert whole[name] == pytest.approx(np.average([s[name] for s in train], weights=weights))


def test_of_nothing(made: Path) -> None:
    told = Tally().to_json()
    assert told["loss_tokens"] == 0
    assert told["entries_per_position"]["max"] == 0


def test_the_table_and_the_json(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(made), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "bytes/supervised token, always_kept_values" in out
    assert SHARD in out
    assert main(["stats", str(made), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert f"{told['splits']['train']['teacher_cross_entropy']:.4f}" in out


def test_damage_is_named(cache_dir: Path) -> None:
    flip(cache_dir / SHARD, 1)
    with pytest.raises(CacheError, match=f"{SHARD}: shard damaged: "):
        cache_stats(open_cache(str(cache_dir)))
