"""Other projects' files become top-k caches that say what they do not know, and can be trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.cache.__main__ import main
from pipeline.cache.io.reader import open_cache
from pipeline.cache.tools.verify import verify_cache
from pipeline.errors import CacheError, ConfigError
from pipeline.storage import Store
from tests.unit.cache.sample_cache import read_all

V, K, L = 50, 4, 7
_Row = dict[str, Any]


def _logprobs(seed: int, length: int = L) -> np.ndarray:
    """Return log-probs of the token at each place, [L, V]; those of the first are of no use."""
    logits = np.random.default_rng(seed).normal(0, 2, (length, V))
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def _row(seed: int) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, and of each the K largest ids and log-probs of its distribution, and all."""
    log_p = _logprobs(seed)
    ids = np.argsort(-log_p, axis=1)[:, :K]
    tokens = np.random.default_rng(seed + 100).integers(0, V, L).tolist()
    return tokens, ids, np.take_along_axis(log_p, ids, axis=1), log_p


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    folder.mkdir()
    vocabulary = {f"t{n}": n for n in range(V - 2)}
    added = [{"id": V - 2, "content": "<s>"}]
    data = {"model": {"vocab": vocabulary}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"vocab_size": V}))
    return folder


@pytest.fixture
def imported(tmp_path: Path, tokenizer: Path) -> Callable[..., Any]:
    """Return a function that writes rows, imports them and returns the cache's rows."""

    def run(form: str, rows: list[_Row], *flags: str, schema: pa.Schema | None = None) -> Any:
        source = tmp_path / "logits"
        source.mkdir(exist_ok=True)
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, source / "data_0.parquet", row_group_size=2)
        target = tmp_path / "cache"
        assert main([
            "import", str(source), str(target), "--format", form, "--tokenizer", str(tokenizer),
            "--heldout-fraction", "0", *flags,
        ]) == 0  # fmt: skip
        assert verify_cache(Store(str(target)), check="decode") == []
        cache = open_cache(str(target))
        return cache, sorted(read_all(cache), key=lambda row: row.input_ids_L.tolist())

    return run


def _assert_targets(row: Any, seed: int, places: list[int]) -> None:
    """Compare a cached row with the distributions of these tokens."""
    tokens, ids, values, log_p = _row(seed)
    assert row.input_ids_L.tolist() == tokens
    assert np.flatnonzero(row.loss_mask_L).tolist() == places
    for number, place in enumerate(places):
        found_ids, found = row.targets.entries(number)
        order = np.argsort(ids[place])
        assert found_ids.tolist() == ids[place][order].tolist()
        np.testing.assert_allclose(found, values[place][order], rtol=0.06, atol=0.02)
        label = row.targets.label_logprob_N[number]
        if tokens[place] in ids[place]:
            np.testing.assert_allclose(label, log_p[place, tokens[place]], rtol=0.06, atol=0.02)
        else:
            assert label >= log_p[place, tokens[place]] - 0.2, "an upper bound"
    assert row.targets.temperatures == (1.0,)


def _sorted(seeds: range) -> list[int]:
    return sorted(seeds, key=lambda seed: _row(seed)[0])


_ALL = list(range(1, L))


@pytest.mark.parametrize("kept", ["each", "next", "supervised"])
def test_plain_lists_of_any_alignment(kept: str, imported: Callable[..., Any]) -> None:
    rows = []
    for seed in range(5):
        tokens, ids, values, _ = _row(seed)
        mask = [place in (2, 3, 6) for place in range(L)]
        take = {"each": range(L), "next": range(1, L), "supervised": (2, 3, 6)}[kept]
        row = {
            "input_ids": tokens, "target_ids": ids[list(take)].tolist(),
            "target_logprobs": values[list(take)].tolist(),
        }  # fmt: skip
        rows.append(row | ({"loss_mask": mask} if kept != "next" else {}))
    cache, found = imported("plain", rows, "--teacher", "big", "--shard-tokens", "15")
    for seed, row in zip(_sorted(range(5)), found, strict=True):
        _assert_targets(row, seed, _ALL if kept == "next" else [2, 3, 6])
    identity = cache.manifest.identity
    assert identity["teacher"]["model"] == "big"
    assert identity["scheme"] == {"name": "top-k", "top_k": K, "temperatures": [1.0]}
    assert any("log Z" in item for item in identity["imported"]["unknown"])
    assert not any("tail" in item and "sum" in item for item in identity["imported"]["unknown"])
    assert cache.manifest.total("train").shards == 3
    assert b"serves students at temperature 1" in cache.store.read("README.md")


def test_what_was_exported_comes_back(
    tmp_path: Path, tokenizer: Path, imported: Callable[..., Any]
) -> None:
    rows = []
    for seed in range(4):
        tokens, ids, values, _ = _row(seed)
        lists = {"target_ids": ids.tolist(), "target_logprobs": values.tolist()}
        rows.append({"input_ids": tokens, **lists})
    _, first = imported("plain", rows)
    main(["export", str(tmp_path / "cache"), str(tmp_path / "plain")])
    flags = ["--format", "plain", "--tokenizer", str(tokenizer), "--heldout-fraction", "0"]
    main(["import", str(tmp_path / "plain/data"), str(tmp_path / "back"), *flags])
    back = read_all(open_cache(str(tmp_path / "back")))
    for row, other in zip(sorted(back, key=lambda r: r.input_ids_L.tolist()), first, strict=True):
        assert row.input_ids_L.tolist() == other.input_ids_L.tolist()
        assert row.targets.token_ids_E.tolist() == other.targets.token_ids_E.tolist()
        for name in ("logprobs_E", "label_logprob_N"):
            pair = (getattr(one.targets, name) for one in (row, other))
            np.testing.assert_allclose(*pair, rtol=0.03, atol=0.01)


@pytest.mark.parametrize("text", [False, True])
def test_axolotl(text: bool, imported: Callable[..., Any]) -> None:
    rows = []
    for seed in range(3):
        tokens, ids, values, _ = _row(seed)
        labels = [-100, -100, -100, *tokens[3:]]
        row: _Row = {"input_ids": tokens, "labels": labels}
        if text:  # of the response alone, right-aligned, as its raw data are
            row["logprobs"] = [
                [{"token": f"token_id:{i}", "logprob": v} for i, v in zip(*pair, strict=True)]
                for pair in zip(ids[3:].tolist(), values[3:].tolist(), strict=True)
            ]
        else:
            even = values - np.log(np.exp(values).sum(1, keepdims=True))
            row |= {"target_token_ids": ids.tolist(), "target_logprobs": even.tolist()}
        rows.append(row)
    flags = ["--columns", "target_logprobs=logprobs"] if text else []
    cache, found = imported("axolotl", rows, *flags)
    unknown = " ".join(cache.manifest.identity["imported"]["unknown"])
    assert ("the entries of every position sum to 1" in unknown) is not text
    for seed, row in zip(_sorted(range(3)), found, strict=True):
        if text:
            _assert_targets(row, seed, [3, 4, 5, 6])
        else:
            assert np.flatnonzero(row.loss_mask_L).tolist() == [3, 4, 5, 6]
            _, mine = row.targets.entries(0)
            np.testing.assert_allclose(np.exp(mine).sum(), 1, atol=0.01)


def test_verl_with_padding(imported: Callable[..., Any]) -> None:
    rows = []
    for seed in range(3):
        tokens, ids, values, _ = _row(seed)
        behind_ids = [*ids[1:].tolist(), [1, 2, 3, 4]]  # behind each token the next one's
        behind_values = [*values[1:].tolist(), [-2.0] * K]
        pad, none = [[0] * K], [[0.0] * K]
        rows.append({
            "input_ids": [9, *tokens, 9, 9],
            "attention_mask": [0, *[1] * L, 0, 0],
            "teacher_topk_indices": pad + behind_ids + pad + pad,
            "teacher_topk_logps": none + behind_values + none + none,
            "response_mask": [1, 1, 0, 1, 0, 0],
        })  # fmt: skip
    _, found = imported("verl", rows)
    for seed, row in zip(_sorted(range(3)), found, strict=True):
        _assert_targets(row, seed, [3, 4, 6])


def _packed(values: np.ndarray, bits: int) -> list[list[int]]:
    """Pack integers, most significant bit first."""
    shifts = np.arange(bits - 1, -1, -1)
    flat = ((values[:, :, None] >> shifts) & 1).astype(np.uint8).reshape(len(values), -1)
    return np.packbits(flat, axis=1).tolist()


_EXACT = {"d": 64, "k": K, "exact_k": K, "exact_dtype": "float32", "delta_encoding": False,
          "residual_bins": []}  # fmt: skip


@pytest.mark.parametrize("form", ["exact", "delta", "curve", "bins"])
def test_distillkit(form: str, imported: Callable[..., Any], tmp_path: Path) -> None:
    """Rows by its published format: see `distillkit/compression` in arcee-ai/DistillKit."""
    config = dict(_EXACT)
    rows = []
    for seed in range(3):
        tokens, ids, values, _ = _row(seed)
        kept = values[1:].astype(np.float32)
        if form == "delta":
            config["delta_encoding"] = True
            kept = np.diff(kept, axis=1, prepend=np.float32(0))
        head = kept.copy().view(np.uint8).reshape(L - 1, -1)
        if form == "curve":  # of two points a straight line is exact
            config |= {"exact_k": 2, "polynomial_terms": [0, 1], "exact_dtype": "bfloat16"}
            line = np.stack([kept[:, 2], kept[:, 3] - kept[:, 2]], 1).astype(np.float32)
            half = (kept[:, :2].copy().view(np.uint32) >> 16).astype("<u2")
            head = np.concatenate([half.view(np.uint8), line.view(np.uint8)], axis=1)
        if form == "bins":
            bins = [{"scale_dtype": "float32", "element_bits": 12, "num_elements": 2}]
            config |= {"exact_k": 2, "residual_bins": bins}
            scale = (np.abs(kept[:, 2:]).max(1, keepdims=True) / 2**11).astype(np.float32)
            codes = np.clip(np.rint(kept[:, 2:] / scale), -(2**11), 2**11 - 1).astype(int) + 2**11
            first = kept[:, :2].copy().view(np.uint8).reshape(L - 1, -1)
            head = np.concatenate(
                [first, scale.view(np.uint8), np.array(_packed(codes, 12), np.uint8)], axis=1
            )
        rows.append({
            "input_ids": tokens, "compressed_logprobs": head.tolist(),
            "bytepacked_indices": _packed(ids[1:], 6),
        })  # fmt: skip
    (tmp_path / "logits").mkdir()
    (tmp_path / "logits/compression_config.yaml").write_text(yaml.safe_dump(config))
    byte_lists = pa.list_(pa.list_(pa.uint8()))
    schema = pa.schema([
        ("input_ids", pa.list_(pa.uint64())), ("compressed_logprobs", byte_lists),
        ("bytepacked_indices", byte_lists),
    ])  # fmt: skip
    cache, found = imported("distillkit", rows, schema=schema)
    for seed, row in zip(_sorted(range(3)), found, strict=True):
        _assert_targets(row, seed, _ALL)
    assert "what its compression has lost" in cache.manifest.identity["imported"]["unknown"]


def test_everything_wrong_with_a_file_at_once(tmp_path: Path, imported: Callable[..., Any]) -> None:
    tokens, ids, values, _ = _row(0)

    def row(**changes: Any) -> _Row:
        return {
            "input_ids": tokens, "target_ids": ids.tolist(), "target_logprobs": values.tolist(),
        } | changes  # fmt: skip

    twice, nan = ids.tolist(), values.tolist()
    twice[3] = [5, 5, 1, 2]
    nan[2] = [float("nan")] * K
    rows = [
        row(),
        row(input_ids=[V, *tokens[1:]]),
        row(target_ids=twice),
        row(target_logprobs=nan),
        row(target_logprobs=(values + 2).tolist()),
        row(target_logprobs=np.full((L, K), -1.0).tolist()),
        row(target_ids=ids[:3].tolist(), target_logprobs=values[:3].tolist()),
        row(target_logprobs=values[:, :2].tolist()),
        row(input_ids=[V, *tokens[1:]]),
        row(target_ids=(ids + V).tolist()),
    ]
    with pytest.raises(CacheError) as caught:
        imported("plain", rows)
    text = str(caught.value)
    assert text.startswith("8 mistakes, expected rows as --format plain has them (correct")
    for line in (
        f"a token id outside the vocabulary of {V}: row 1 of {tmp_path}/logits/data_0.parquet, "
        "and 1 more",
        "an id twice at a position: row 2",
        "a log-prob that is not a number: row 3",
        "a log-prob above 0: row 4",
        "probabilities of a position that sum to more than 1: row 5",
        "3 lists of entries, expected 6 or 7: row 6",
        "target_ids and target_logprobs differ in length: row 7",
        f"an entry's id outside the vocabulary of {V}: row 9",
    ):
        assert line in text, line
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("wrong", [float("nan"), float("-inf"), 0.5])
def test_labels_are_looked_at_before_anything_is_written(
    wrong: float, tmp_path: Path, imported: Callable[..., Any]
) -> None:
    tokens, ids, values, log_p = _row(0)
    labels = [float(log_p[place, tokens[place]]) for place in _ALL]
    base = {"input_ids": tokens, "target_ids": ids.tolist(), "target_logprobs": values.tolist()}
    rows = [base | {"label_logprob": labels}, base | {"label_logprob": [*labels[:-1], wrong]}]
    with pytest.raises(CacheError, match="a label_logprob that is no log-prob: row 1 of"):
        imported("plain", rows)
    assert not (tmp_path / "cache").exists()
    cache, (row,) = imported("plain", rows[:1])
    assert cache.manifest.total().rows == 1
    np.testing.assert_allclose(row.targets.label_logprob_N, labels, rtol=0.06, atol=0.02)


def test_wrong_columns_and_flags(tmp_path: Path, tokenizer: Path) -> None:
    source = tmp_path / "logits"
    source.mkdir()
    columns = {"input_ids": ["text"], "target_id": [[[1]]], "target_logprobs": [[[-1.0]]]}
    pq.write_table(pa.table(columns), source / "a.parquet")
    base = ["import", str(source), str(tmp_path / "cache"), "--format"]
    flags = ["--tokenizer", str(tokenizer)]
    with pytest.raises(CacheError) as caught:
        main([*base, "plain", *flags])
    text = str(caught.value)
    assert "no column target_ids; did you mean target_id?" in text
    assert "column input_ids: found string, expected a list of integers" in text
    shutil.copy(source / "a.parquet", source / "b.parquet")
    with pytest.raises(CacheError, match="2 mistakes") as caught:  # of thousands of files, too
        main([*base, "plain", *flags])
    assert str(caught.value).count(f"{source}/a.parquet, and 1 more") == 2
    with pytest.raises(ConfigError, match="3 mistakes") as wrong:
        main([*base, "distillkit", "--columns", "ids=x"])
    for line in ("--tokenizer: found none", "--columns: found 'ids=x'", "--compression: found no"):
        assert line in str(wrong.value)
    (source / "compression_config.yaml").write_text(yaml.safe_dump({"k": 3, "colour": 1}))
    with pytest.raises(ConfigError, match="unknown member colour, no d, no exact_k"):
        main([*base, "distillkit", *flags])
    bins = [{"scale_dtype": "float32", "num_elements": 2}, {"scale_dtype": 8, "element_bits": 0}]
    compressed = {"d": 64, "k": "4", "exact_k": -1, "residual_bins": bins}
    for content, line in (
        (compressed, "k: found '4', expected a whole number from 1, exact_k: found -1, expected"),
        (compressed, "residual bin 0: no element_bits, residual bin 1: element_bits: found 0, exp"),
        (compressed, "residual bin 1: no num_elements, dtype 8"),
        ({**_EXACT, "exact_k": 9}, "exact_k and residual_bins: 9 log-probs, more than k, 4"),
        ({**_EXACT, "residual_bins": ["x"]}, r"residual_bins: found \['x'\], expected a list of"),
    ):
        (source / "compression_config.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigError, match=line):
            main([*base, "distillkit", *flags])
    (source / "b.parquet").write_bytes(b"PAR1 no more")
    (source / "c.parquet").write_bytes(b"PAR1 nor this")
    with pytest.raises(CacheError, match=r"b\.parquet: not readable as Parquet") as caught:
        main([*base, "plain", *flags])
    assert "c.parquet: not readable as Parquet" in str(caught.value)
    with pytest.raises(CacheError, match="no Parquet file there"):
        main(["import", str(tokenizer), str(tmp_path / "cache"), "--format", "plain", *flags])
    assert not (tmp_path / "cache").exists()


def test_a_killed_import_goes_on(
    tmp_path: Path, imported: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for seed in range(6):
        tokens, ids, values, _ = _row(seed)
        lists = {"target_ids": ids.tolist(), "target_logprobs": values.tolist()}
        rows.append({"input_ids": tokens, **lists})
    flags = ("--shard-tokens", "14")
    cache, _ = imported("plain", rows, *flags)
    whole = {f.name: f.read_bytes() for f in (tmp_path / "cache").rglob("*.parquet")}
    shard = tmp_path / "cache/data/train/00001.parquet"
    shard.unlink()
    (tmp_path / "cache/_meta/manifest.json").unlink()
    imported("plain", rows, *flags)
    assert whole == {f.name: f.read_bytes() for f in (tmp_path / "cache").rglob("*.parquet")}
    assert open_cache(str(tmp_path / "cache")).manifest == cache.manifest
