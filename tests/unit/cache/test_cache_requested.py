"""Whole caches with the writer's columns: every tool serves them, none mixes them with others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.codec.requested import merged, new_requested, requested_code, requested_values
from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.codec.targets import CachedSequence, RequestedEntries
from pipeline.cache.io.finalize import finalize
from pipeline.cache.io.reader import open_cache
from pipeline.cache.io.tables import decode_table, encode_table, table_from_bytes
from pipeline.cache.io.writer import commit_shard, encode_shard
from pipeline.cache.tools.merge import merge_caches
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.sampling.inclusion import InclusionRule
from pipeline.storage import Store
from tests.unit.cache.sample_cache import SIZES, read_all, sample_identity, sample_rows
from tests.unit.cache.sampled_cache import GRID, RULES, sampled_rows

Made = tuple[list[CachedSequence], list[Any]]
RULE = {"top-k": None, "threshold": RULES[1]}


def _spec(rule: InclusionRule | None, *, with_both: bool = True) -> CodecSpec:
    return CodecSpec(500, rule, written_logprobs=with_both, requested_entries=with_both)


def _rows(rule: InclusionRule | None, number: int, seed: int) -> Made:
    """Return rows whose writer named one entry of the scheme, the label, and two other ids."""
    rows, tails = sample_rows(number, seed) if rule is None else sampled_rows(number, seed, rule)
    draw, made = np.random.default_rng(seed), []
    for row in rows:
        targets, ids, logprobs, counts = row.targets, [], [], []
        labels = row.input_ids_L[row.loss_mask_L]
        for n in range(targets.num_positions):
            own, values = targets.entries(n)
            asked = {int(labels[n]): float(targets.label_logprob_N[n])}
            if len(own):
                asked[int(own[-1])] = float(values[-1])
            others = [t for t in draw.permutation(500)[:9].tolist() if t not in own]
            asked |= {token: -float(draw.exponential(8)) for token in others[:2]}
            ids += list(asked)
            logprobs += asked.values()
            counts.append(len(asked))
        requested = RequestedEntries(
            np.array(counts, np.int32), np.array(ids, np.int32), np.array(logprobs, np.float32)
        )
        made.append(
            replace(
                row,
                targets=replace(
                    targets, requested=requested, written_logprob_N=targets.label_logprob_N
                ),
            )
        )
    return made, tails


def _write(
    folder: Path, name: str, *, with_both: bool = True, seed: int = 0, teacher: str = "tiny"
) -> str:
    """Write a complete cache."""
    rule = RULE[name]
    spec, store = _spec(rule, with_both=with_both), Store(str(folder))
    scheme: dict[str, Any] = {"name": name, "temperatures": list(GRID)}
    scheme |= {"top_k": 6} if rule is None else {"taus": list(rule.taus)}
    identity = sample_identity(scheme=scheme, codec=spec.to_json())
    identity["teacher"]["model"] = teacher
    for split, index, number in SIZES:
        rows, tails = _rows(rule, number, seed + 100 * (split == "heldout") + index)
        record, data = encode_shard(
            rows, spec, split=split, index=index, temperatures=GRID,
            identity_digest=fingerprint(identity), tails=tails,
        )  # fmt: skip
        commit_shard(store, record, data)
    store.write("_meta/tokenizer/tokenizer.json", b'{"model": {"vocab": {"a": 0, "b": 1}}}')
    finalize(
        store, Counter(split for split, _, _ in SIZES), identity=identity, spec=spec,
        temperatures=GRID, corpus_counts={"rows": 10}, tokenizer_files=["tokenizer.json"],
        command="made by a test",
    )  # fmt: skip
    return str(folder)


def _same(one: Sequence[CachedSequence], two: Sequence[CachedSequence]) -> None:
    for a, b in zip(one, two, strict=True):
        for name in ("counts_N", "token_ids_E", "logprobs_E", "inclusion_E", "requested_E"):
            np.testing.assert_array_equal(getattr(a.targets, name), getattr(b.targets, name))
        np.testing.assert_array_equal(a.targets.written_logprob_N, b.targets.written_logprob_N)


def test_codes_are_finer_than_an_entry_s() -> None:
    wanted = -np.geomspace(1e-4, 60, 400)
    found = requested_values()[requested_code(wanted)]
    assert (np.abs(found - wanted) <= 0.0141 * (0.05 - wanted) + 1e-6).all()
    assert requested_code(np.array([-1e9]))[0] == 255


@pytest.mark.parametrize("name", RULE)
def test_a_reader_merges_them(name: str, tmp_path: Path) -> None:
    rule = RULE[name]
    rows, tails = _rows(rule, 5, 3)
    shards = [
        encode_shard(
            rows, _spec(rule, with_both=flag), split="train", index=0, temperatures=GRID,
            identity_digest="d", tails=tails,
        )
        for flag in (True, False)
    ]  # fmt: skip
    full, bare = ([*decode_table(table_from_bytes(data, "d"))] for _, data in shards)
    assert shards[0][0].entries == sum(int(row.targets.counts_N.sum()) for row in full)
    assert shards[0][0].kept_mass == shards[1][0].kept_mass
    for row, got, plain in zip(rows, full, bare, strict=True):
        assert plain.targets.requested_E is None
        asked = row.targets.requested
        assert asked is not None
        ends = np.cumsum(asked.counts_N)
        for n, end in enumerate(ends):
            part = slice(end - asked.counts_N[n], end)
            wanted = set(asked.token_ids_E[part].tolist())
            ids, _ = got.targets.entries(n)
            assert sorted(ids.tolist()) == sorted(
                wanted | set(plain.targets.entries(n)[0].tolist())
            )
    table = table_from_bytes(shards[0][1], "d")
    assert encode_table([table], split="train", index=0, identity_digest="d")[1] == shards[0][1]


@pytest.mark.parametrize("name", RULE)
def test_the_tools_serve_them(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = _write(tmp_path / "one", name)
    for command in (["verify", url], ["inspect", url], ["stats", url]):
        assert main(command) == 0, command
    assert "requested" in capsys.readouterr().out
    whole = read_all(open_cache(url))
    less = ["--top-k", "2"] if name == "top-k" else ["--tau-factor", "3"]
    assert main(["slice", url, str(tmp_path / "less"), *less]) == 0
    assert main(["verify", str(tmp_path / "less")]) == 0
    # Fewer of the scheme's entries, and all that were asked for, known exactly.
    for row, short in zip(whole, read_all(open_cache(str(tmp_path / "less"))), strict=True):
        np.testing.assert_array_equal(
            row.targets.written_logprob_N, short.targets.written_logprob_N
        )
        assert short.targets.counts_N.sum() <= row.targets.counts_N.sum()
        for n in range(row.targets.num_positions):
            start = int(row.targets.counts_N[:n].sum())
            ids = row.targets.entries(n)[0]
            asked = ids[row.targets.requested_E[start : start + len(ids)]]
            assert set(asked.tolist()) <= set(short.targets.entries(n)[0].tolist())
    assert main(["export", url, str(tmp_path / "plain")]) == 0
    first = pq.read_table(tmp_path / "plain/data/train/00000.parquet").to_pylist()[0]
    assert list(chain(*first["target_ids"])) == whole[0].targets.token_ids_E.tolist()
    np.testing.assert_allclose(first["written_logprob"], whole[0].targets.written_logprob_N)
    assert "written_logprob" in (tmp_path / "plain/README.md").read_text()


@pytest.mark.parametrize("name", RULE)
def test_caches_are_merged_with_their_like_alone(name: str, tmp_path: Path) -> None:
    one = _write(tmp_path / "one", name)
    two = _write(tmp_path / "two", name, seed=50, teacher="other")
    bare = _write(tmp_path / "bare", name, with_both=False, seed=70, teacher="third")
    assert main(["merge", one, two, str(tmp_path / "sum")]) == 0
    rows = read_all(open_cache(str(tmp_path / "sum")))
    found = {row.sample_id: row for row in rows}
    _same([found[row.sample_id] for row in read_all(open_cache(one))], read_all(open_cache(one)))
    with pytest.raises(CacheError) as error:
        merge_caches(Store(str(tmp_path / "none")), [one, bare], command="c")
    assert "codec.requested_entries" in str(error.value)
    assert "codec.written_logprobs" in str(error.value)
    assert not (tmp_path / "none").exists()


def test_what_cannot_have_been_written() -> None:
    rows, tails = _rows(None, 2, 0)
    spec = _spec(None)

    def encode(targets: Any) -> None:
        made = [replace(rows[0], targets=targets), rows[1]]
        encode_shard(
            made, spec, split="train", index=0, temperatures=GRID, identity_digest="d", tails=tails
        )

    asked = rows[0].targets.requested
    assert asked is not None
    assert len(asked.token_ids_E)
    for change, says in (
        (None, "without requested entries"),
        (replace(asked, token_ids_E=asked.token_ids_E + 500), "outside the vocabulary of 500"),
        (replace(asked, logprobs_E=asked.logprobs_E * np.nan), "not finite"),
        (replace(asked, logprobs_E=asked.logprobs_E[1:]), "differ in length"),
        (replace(asked, token_ids_E=asked.token_ids_E * 0), "a token id occurs twice"),
    ):
        with pytest.raises(CacheError, match=says):
            encode(replace(rows[0].targets, requested=change))


def test_the_merge_of_one_position_by_hand() -> None:
    """Label 7; kept 2, 9; sampled 3, 5. Asked for: 2 (kept), 4 (new), 5 (sampled)."""
    found = merged(
        np.array([5], np.int32), np.array([7, 2, 9, 3, 5], np.int32),
        np.array([-1, -2, -3, -4, -5], np.float32), np.array([1, 1, 1, 0.5, 0.25], np.float32),
        always_kept_N=np.array([2]), requested_N=np.array([3]),
        requested_ids=np.array([2, 4, 5], np.int32), requested_codes=np.array([1, 2, 3], np.uint8),
    )  # fmt: skip
    value = requested_values()
    assert found.counts_N.tolist() == [6]
    assert found.ids_E.tolist() == [7, 2, 4, 5, 9, 3]
    np.testing.assert_array_equal(
        found.logprobs_E, np.array([-1, value[1], value[2], value[3], -3, -4], np.float32)
    )
    assert found.inclusion_E is not None
    assert found.inclusion_E.tolist() == [1, 1, 1, 1, 1, 0.5]
    assert found.requested_E.tolist() == [False, False, True, True, False, False]
    kept, sampled = (np.array([2]), np.array([2, 9])), (np.array([2]), np.array([3, 5]))
    assert new_requested(np.array([3]), np.array([2, 4, 5]), [kept, sampled]) == 1
    assert json.dumps(_spec(None).to_json()).count("true") == 2
