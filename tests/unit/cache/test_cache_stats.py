"""`stats` prints what numpy computes from the decoded rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.amounts import BYTES_PER_TOKEN, bytes_per_token
from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import open_cache
from pipeline.cache.layout.card import card_text
from pipeline.cache.tools.stats import Tally, cache_stats, stats_lines
from pipeline.errors import CacheError
from pipeline.report import Report
from pipeline.report.compose.cache import cache_facts
from pipeline.report.html.page import render_page
from tests.unit.cache.planned_cache import flip
from tests.unit.cache.sample_cache import SHARD, SPEC

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


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
    masses = [
        np.exp(row.targets.entries(n)[1], dtype=np.float64).sum()
        for row in rows
        for n in range(row.targets.num_positions)
    ]
    above = got["always_kept_mass_above_one"]
    assert above["share"] == pytest.approx(np.mean(np.array(masses) > 1 + 1e-6))
    assert above["by_at_most"] == pytest.approx(max(0, max(masses) - 1))
    sizes = got["bytes_per_loss_token"]
    assert set(sizes["columns"]) == set(pq.read_schema(files[0]).names)
    total = sum(file.stat().st_size for file in files)
    assert sizes["all"] == pytest.approx(total / counts.size)
    assert sizes["all"] == pytest.approx(sizes["targets"] + sizes["text"] + sizes["file"])
    assert sizes["targets"] + sizes["text"] == pytest.approx(sum(sizes["columns"].values()))
    assert sizes["text"] > sizes["columns"]["input_ids"] > 0
    # The columns are the file but for its footer and magic bytes.
    assert 0 < sizes["file"] < 0.9 * sizes["all"]


def test_always_kept_mass_above_one_counts_no_sampled_entry() -> None:
    cache = open_cache(str(GOLDEN / "cache-v1-threshold-of-three"))
    masses = []
    for row in cache.rows("train"):
        targets = row.targets
        assert targets.inclusion_E is not None
        p_E = np.where(targets.inclusion_E == 1, np.exp(targets.logprobs_E, dtype=np.float64), 0)
        masses += np.split(p_E, np.cumsum(targets.counts_N))[:-1]
    sums = np.array([part.sum() for part in masses])
    found = cache_stats(cache)["splits"]["train"]["always_kept_mass_above_one"]
    assert (sums > 1).any()
    assert found["share"] == pytest.approx((sums > 1 + 1e-6).mean())
    assert found["by_at_most"] == pytest.approx(sums.max() - 1)


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
    assert SHARD in out
    # What is asked first comes first, and the codec's columns only when they are asked for.
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[3:7]] == [
        "rows", "tokens", "supervised tokens", BYTES_PER_TOKEN,
    ]  # fmt: skip
    assert "always_kept_values" not in out
    assert len(lines) < 30
    assert main(["stats", str(made), "--workers", "1", "--columns"]) == 0
    assert "bytes in always_kept_values" in capsys.readouterr().out
    assert main(["stats", str(made), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert f"{told['splits']['train']['teacher_cross_entropy']:.4f}" in out


def test_many_shards_are_not_listed_unless_asked_for(made: Path) -> None:
    facts = cache_stats(open_cache(str(made)))
    facts["shards"] = facts["shards"] * 10
    assert list(stats_lines(facts))[-1] == "30 shards; --shards lists the numbers of each"
    assert len(list(stats_lines(facts, shards=True))) == len(list(stats_lines(facts))) + 30


def test_a_mean_over_no_position_is_a_dash() -> None:
    cache = open_cache(str(GOLDEN / "cache-v1-threshold"))  # nothing supervised is held out
    table = [line for line in stats_lines(cache_stats(cache)) if line.strip()]
    lines = {line[:20].strip(): line.split()[-1] for line in table}
    assert lines["kept mass, mean"] == lines["entropy (nats), mean"] == "—"
    assert lines["tokens"] == "3"


def test_no_mean_is_told_of_a_split_without_targets(capsys: pytest.CaptureFixture[str]) -> None:
    url = str(GOLDEN / "cache-v1-threshold")
    assert main(["inspect", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "heldout      1 shards, 1 sequences, 3 tokens, 0 supervised"
    assert "| heldout | 1 | 1 | 3 | 0 | — | — |" in card_text(open_cache(url).manifest, "c")


def test_one_number_of_bytes_a_token_everywhere(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """inspect, stats, the card and the report's record say the same of the same cache."""
    cache = open_cache(str(made))
    shown = {}
    for split in ("train", "heldout"):
        total = cache.manifest.total(split)
        files = sum(f.stat().st_size for f in (made / "data" / split).glob("*.parquet"))
        shown[split] = f"{files / total.loss_tokens:.1f}"
        stats = cache_stats(cache)["splits"][split]["bytes_per_loss_token"]
        assert f"{stats['all']:.1f}" == shown[split]
    assert main(["inspect", str(made)]) == 0
    said = capsys.readouterr().out
    card = card_text(cache.manifest, "command")
    assert f"| {BYTES_PER_TOKEN} |" in card
    for split, number in shown.items():
        assert re.search(rf"^{split} .* {number} {BYTES_PER_TOKEN},", said, re.MULTILINE)
        assert re.search(rf"^\| {split} .*\| {number} \|", card, re.MULTILINE)
    facts = cache_facts(cache)
    page = render_page(Report("t", (), cache=facts))
    each = bytes_per_token(facts.size_bytes, facts.loss_tokens)
    assert f"{each:.1f} {BYTES_PER_TOKEN}" in page


def test_settings_are_shown_as_in_a_file_of_them(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(made)]) == 0
    out = capsys.readouterr().out
    assert "{" not in out
    assert "None" not in out.partition("codec")[2].partition("\n")[0]
    assert "quantisation.tail_step 0.0625" in out


def test_damage_is_named(cache_dir: Path) -> None:
    flip(cache_dir / SHARD, 1)
    with pytest.raises(CacheError, match=f"{SHARD}: shard damaged: "):
        cache_stats(open_cache(str(cache_dir)))
