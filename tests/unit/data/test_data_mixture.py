"""Several caches as one: what users name, what must fit, rows, several teachers of one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.api.settings import StudentRun
from pipeline.cache.io.writer import commit_shard
from pipeline.config import parse_command
from pipeline.data.collate import collate
from pipeline.data.mixture.caches import MixedCache, caches_of, check_apart, open_caches
from pipeline.data.mixture.rows import MixedPart, MixedRows, SharedRows, teacher_of_row
from pipeline.data.mixture.settings import CacheShare, cache_text, caches_named
from pipeline.data.settings import DataSettings
from pipeline.errors import CacheError, ConfigError, DistillError
from pipeline.loss.settings import LossSettings
from pipeline.storage import Store
from pipeline.student.compatibility import check_caches
from pipeline.student.sequence.slices import slice_batch
from tests.unit.cache.sample_cache import SIZES, finish, sample_identity, sample_shard, write_cache

MakeSource = Callable[..., Any]


def parsed(*argv: str) -> StudentRun:
    return parse_command(StudentRun, argv, prog="", description="").settings


def test_the_setting_takes_one_address_or_a_list(tmp_path: Path) -> None:
    assert parsed("--cache_dir", "a/b").cache_dir == "a/b"
    two = parsed("--cache_dir", "runs/a", "s3://b/cache-2/").cache_dir
    assert two == (
        CacheShare(url="runs/a", tag="a"),
        CacheShare(url="s3://b/cache-2/", tag="cache-2"),
    )
    file = tmp_path / "run.yaml"
    file.write_text(
        "cache_dir:\n- {url: x/cache, weight: 0.7, tag: code}\n- {url: y, weight: 0.3}\n"
    )
    mixture = parsed("--config", str(file)).cache_dir
    assert cache_text(mixture) == "0.7 x/cache + 0.3 y"
    assert caches_named(mixture) == [("code", "x/cache"), ("y", "y")]
    assert caches_named("a/b") == [("", "a/b")]


def test_mistakes_of_a_list_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parsed("--cache_dir", "[{url: a, weight: 0}, {url: b, wieght: 2}, {url: c, tag: x/y}, {}]")
    message = str(caught.value)
    for part in (
        "cache 1: weight: found 0, expected greater than 0",
        "cache 2: wieght: unknown field; did you mean weight?",
        "cache 3: tag: found 'x/y', expected letters, digits",
        "cache 4: url: required",
    ):
        assert part in message
    with pytest.raises(ConfigError, match=r"found '\[{url: a', expected an address or a list"):
        parsed("--cache_dir", "[{url: a")
    with pytest.raises(ConfigError, match="found the tag cache 2 times, expected another"):
        parsed("--cache_dir", "a/cache", "b/cache")


def cache_of(folder: Path, identity: dict[str, Any], sizes: Any = SIZES) -> CacheShare:
    store, records = Store(str(folder)), []
    for split, index, rows in sizes:
        record, data = sample_shard(split, index, rows, identity=identity)
        commit_shard(store, record, data)
        records.append(record)
    finish(store, records, identity)
    return CacheShare(url=str(folder), tag=folder.name)


def test_what_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    write_cache(str(tmp_path / "a"))
    one = CacheShare(url=str(tmp_path / "a"), tag="a")
    tokenizer = {"vocabulary_sha256": "1" * 64, "size": 500}
    other = cache_of(tmp_path / "b", sample_identity(tokenizer=tokenizer))
    twin = CacheShare(url=str(tmp_path / "b"), tag="twin")
    lost = CacheShare(url=str(tmp_path / "lost"), tag="lost")
    with pytest.raises(DistillError) as caught:
        open_caches([one, other, twin, lost])
    assert caught.value.exit_code == CacheError.exit_code
    # One line each, with what was expected of it and what to do.
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == 4, lines
    assert all("; expected " in line for line in lines)
    assert "/lost: no cache there" in lines[0]
    assert "twin and b are the same cache" in lines[1]
    assert "b does not fit together with a: tokenizer.vocabulary_sha256: 1111" in lines[2]
    assert "in a; expected one tokenizer" in lines[2]
    with pytest.raises(Exception, match="lost"):
        open_caches([one, lost])


def test_a_mixture_is_read_as_one_cache(tmp_path: Path) -> None:
    write_cache(str(tmp_path / "a"))
    one = CacheShare(url=str(tmp_path / "a"), weight=3, tag="a")
    teacher = {**sample_identity()["teacher"], "model": "other"}
    other = cache_of(tmp_path / "b", sample_identity(teacher=teacher), (("train", 0, 4), SIZES[2]))
    cache = open_caches([one, other])
    assert isinstance(cache, MixedCache)
    assert cache.manifest.identity["teacher"]["model"] == "tiny + other"
    assert cache.manifest.total("train").rows == 12
    assert len(cache.records("train")) == 3
    source = cache.source("train")
    assert list(source.shard_rows()) == [5, 3, 4]
    rows = source.read_rows(2, [1, 3])
    assert all(row.sample_id.startswith("b:") for row in rows)
    own = caches_of(cache)[1].source("train").read_rows(0, [1, 3])
    np.testing.assert_array_equal(rows[1].targets.logprobs_E, own[1].targets.logprobs_E)
    assert source.shard_name(2) == "b/data/train/00000.parquet"
    assert cache.full_url(source.shard_name(2)).startswith(str(tmp_path / "b"))
    weighted = open_caches([one, replace_weight(other, 2.0)])
    assert weighted.manifest.identity_digest != cache.manifest.identity_digest


def replace_weight(share: CacheShare, weight: float) -> CacheShare:
    return share.model_copy(update={"weight": weight})


def test_a_sample_held_out_in_one_and_trained_on_in_another(tmp_path: Path) -> None:
    write_cache(str(tmp_path / "a"))
    one = CacheShare(url=str(tmp_path / "a"), tag="a")
    identity = sample_identity(corpus={"source": "turned"})
    # The held-out rows of `a` are made from seed 100: here they are trained on.
    store = Store(str(tmp_path / "b"))
    record, data = sample_shard("heldout", 0, 2, identity=identity)
    moved = record.moved("train", 0)
    commit_shard(store, moved, data)
    finish(store, [moved], identity)
    mixture = open_caches([one, CacheShare(url=str(tmp_path / "b"), tag="b")])
    with pytest.raises(CacheError, match="2 samples are held out in one cache and trained on"):
        check_apart(mixture)


def test_what_the_caches_targets_cannot_serve(tmp_path: Path) -> None:
    write_cache(str(tmp_path / "a"))
    one = CacheShare(url=str(tmp_path / "a"), tag="a")
    other = cache_of(tmp_path / "b", sample_identity(corpus={"source": "b"}))
    mixture = open_caches([one, other], teachers="mean")
    with pytest.raises(ConfigError) as caught:
        check_caches(
            LossSettings(divergence="reverse_kl", temperature=3.0),
            DataSettings(teachers="mean"),
            mixture,
        )
    assert "data.teachers: found mean with loss.divergence reverse_kl" in str(caught.value)
    assert "a: loss.temperature: found 3" in str(caught.value)
    assert "b: loss.temperature: found 3" in str(caught.value)


def shared(make_source: MakeSource, teachers: Any, weights: tuple[float, ...]) -> SharedRows:
    """Return sources of the same text, the targets of the second and later ones changed."""
    sources = [make_source([6, 4]) for _ in weights]
    for number, source in enumerate(sources):
        for row in (row for shard in source.rows for row in shard):
            row.targets.logprobs_E[:] -= number
            row.targets.label_logprob_N[:] -= number
    parts = tuple(
        MixedPart(f"t{i}", w, s) for i, (w, s) in enumerate(zip(weights, sources, strict=True))
    )
    return SharedRows(sources[0], parts, teachers)


def test_a_batch_of_several_teachers_has_their_targets_side_by_side(
    make_source: MakeSource,
) -> None:
    rows = shared(make_source, "mean", (3.0, 1.0)).read_rows(0, [0, 2, 5])
    batch = collate(rows, temperature=2.0)
    alone = collate(make_source([6, 4]).read_rows(0, [0, 2, 5]), temperature=2.0)
    assert batch.share_N is not None
    assert batch.teacher_N is not None
    assert batch.num_loss_tokens == 2 * alone.num_loss_tokens
    torch.testing.assert_close(batch.label_index_N, alone.label_index_N.repeat_interleave(2))
    torch.testing.assert_close(batch.teacher_N, torch.tensor([0, 1] * alone.num_loss_tokens))
    torch.testing.assert_close(batch.share_N, torch.tensor([0.75, 0.25] * alone.num_loss_tokens))
    torch.testing.assert_close(batch.label_logprob_N[1::2], alone.label_logprob_N - 1)
    torch.testing.assert_close(batch.ids_NK[::2, : alone.ids_NK.shape[1]], alone.ids_NK)
    # Slices for several processes keep targets, shares and caches together.
    parts = [slice_batch(batch, part=part, size=2).batch for part in range(2)]
    for name in ("share_N", "teacher_N", "label_logprob_N"):
        torch.testing.assert_close(
            torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)
        )


def test_one_teacher_a_row_in_proportion_to_the_weights(make_source: MakeSource) -> None:
    ids = [f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}" + "0" * 16 for n in range(4000)]
    chosen = [teacher_of_row(name, [3.0, 1.0]) for name in ids]
    assert sum(chosen) == pytest.approx(1000, abs=80)
    rows = shared(make_source, "one", (1.0, 1.0))
    first = [
        row for shard, n in enumerate(rows.shard_rows()) for row in rows.read_rows(shard, range(n))
    ]
    batch = collate(first, temperature=1.0)
    assert batch.share_N is None
    assert batch.teacher_N is not None
    wanted = [teacher_of_row(row.sample_id, [1.0, 1.0]) for row in first]
    assert [row.teacher for row in first] == wanted  # type: ignore[attr-defined]


def test_caches_of_other_rows_have_no_mean(make_source: MakeSource, tmp_path: Path) -> None:
    rows = shared(make_source, "mean", (1.0, 1.0))
    other = rows.parts[1].source
    other.rows[0][0] = replace(other.rows[0][0], sample_id="f" * 32)  # type: ignore[attr-defined]
    with pytest.raises(CacheError, match="t1: row ffff"):
        rows.read_rows(0, [0])
    write_cache(str(tmp_path / "a"))
    one = CacheShare(url=str(tmp_path / "a"), tag="a")
    less = cache_of(tmp_path / "b", sample_identity(corpus={"source": "b"}), (SIZES[0], SIZES[2]))
    with pytest.raises(CacheError, match="b: other training rows than a"):
        open_caches([one, less], teachers="mean").source("train")


def test_caches_of_other_grids_and_schemes_meet_in_a_batch(make_source: MakeSource) -> None:
    top_k, sampled = make_source([3]), make_source([3], inclusion=True, seed=1)
    for row in top_k.rows[0]:
        object.__setattr__(
            row, "targets",
            replace(
                row.targets, temperatures=(1.0, 1.5, 2.0),
                log_z_NG=np.insert(row.targets.log_z_NG, 1, 9.0, axis=1),
                entropy_NG=np.insert(row.targets.entropy_NG, 1, 9.0, axis=1),
            ),
        )  # fmt: skip
    mixed = MixedRows((MixedPart("a", 1.0, top_k), MixedPart("b", 1.0, sampled)))
    rows = [*mixed.read_rows(0, [0, 1]), *mixed.read_rows(1, [2])]
    batch = collate(rows, temperature=2.0)
    own = [collate([row], temperature=2.0) for row in rows]
    torch.testing.assert_close(batch.log_z_N, torch.cat([b.log_z_N for b in own]))
    assert batch.top_k_N is not None
    assert batch.inclusion_NK is not None
    counts = [b.num_loss_tokens for b in own]
    assert batch.top_k_N.tolist() == [True] * (counts[0] + counts[1]) + [False] * counts[2]
    assert (batch.inclusion_NK[batch.top_k_N] == 1).all()


def test_a_mean_of_three_teachers_has_each_of_them_once(make_source: MakeSource) -> None:
    (row,) = shared(make_source, "mean", (2.0, 1.0, 5.0)).read_rows(0, [0])
    (first,) = make_source([6, 4]).read_rows(0, [0])
    taught = row.all_targets()  # type: ignore[attr-defined]
    assert [(cache, share) for cache, share, _ in taught] == [(0, 0.25), (1, 0.125), (2, 0.625)]
    for cache, _, targets in taught:
        np.testing.assert_allclose(
            targets.label_logprob_N, first.targets.label_logprob_N - cache, rtol=1e-6
        )


def test_caches_with_other_supervised_tokens_have_no_mean(make_source: MakeSource) -> None:
    rows = shared(make_source, "mean", (1.0, 1.0))
    second = rows.parts[1].source
    mask_L = second.rows[0][1].loss_mask_L.copy()  # type: ignore[attr-defined]
    mask_L[-1] ^= True
    second.rows[0][1] = replace(second.rows[0][1], loss_mask_L=mask_L)  # type: ignore[attr-defined]
    rows.read_rows(0, [0])
    with pytest.raises(CacheError, match="is not the row"):
        rows.read_rows(0, [1])
