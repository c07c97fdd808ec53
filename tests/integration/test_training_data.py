"""Stage two and its data: damaged shards left out, budgets of tokens, local copies, stalls."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.io.reader import open_cache
from pipeline.observe.metrics import read_metrics
from tests.conftest import Stage, Tiny, digests
from tests.stage_runner import run_python

SHARD = "data/train/00002.parquet"
SKIP = ("--data.on_damaged_shard", "skip")


def _losses(folder: Path) -> list[tuple[int, dict[str, float]]]:
    records = [record.without_timing() for record in read_metrics(folder / "metrics.jsonl")]
    return [(record.step, record.values) for record in records]


def _nearly_same(
    ours: list[tuple[int, dict[str, float]]], theirs: list[tuple[int, dict[str, float]]]
) -> None:
    """Compare what does not depend on how a step is divided, but for the order of sums."""
    names = {"train/loss", "train/tokens", "train/skipped_rows", "heldout/kl"}
    for (step, a), (_, b) in zip(ours, theirs, strict=True):
        mine, other = ({n: v for n, v in x.items() if n in names} for x in (a, b))
        assert mine == pytest.approx(other, rel=1e-4), step


@pytest.fixture(scope="module")
def damaged(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the cache with one bit of one training shard flipped."""
    folder = tmp_path_factory.mktemp("damaged") / "cache"
    shutil.copytree(tiny_cache, folder)
    data = bytearray((folder / SHARD).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / SHARD).write_bytes(bytes(data))
    return folder


@pytest.fixture(scope="module")
def flags(tiny: Tiny, damaged: Path) -> list[Any]:
    return [*tiny.stage_two, "--cache_dir", damaged, *SKIP]


@pytest.fixture(scope="module")
def without_shard(
    flags: list[Any], stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Return the folder of an undisturbed run that leaves the shard out, and its log."""
    folder = tmp_path_factory.mktemp("skip") / "student"
    return folder, stage("train_student", [*flags, "--output_dir", folder]).ok().err


def test_skipped_and_reported(without_shard: tuple[Path, str], damaged: Path) -> None:
    folder, log = without_shard
    source = open_cache(str(damaged)).source("train")
    names = [source.shard_name(shard) for shard in range(len(source.shard_rows()))]
    rows = source.shard_rows()[names.index(SHARD)]
    (record,) = json.loads((folder / "skipped-shards.json").read_text())
    assert (record["path"], record["rows"]) == (SHARD, rows)
    assert "checksum" in record["reason"]
    assert log.count(f"its {rows} rows are skipped from step") == 1
    # The last step has a second record, of the evaluation.
    steps = [(step, values) for step, values in _losses(folder) if "train/loss" in values]
    per_step = {step: values.get("train/skipped_rows", 0) for step, values in steps}
    first = record["from_step"] + 1
    assert per_step[first] > 0
    assert not any(per_step[step] for step in per_step if step < first)
    total = int(sum(per_step.values()))
    card = (folder / "model/README.md").read_text()
    assert f"{total} rows of damaged shards were skipped (repeats counted)." in card


@pytest.mark.parametrize("step", [2, 7])
def test_killed_and_run_again_leaves_out_the_same(
    step: int, flags: list[Any], without_shard: tuple[Path, str], stage: Stage, tmp_path: Path
) -> None:
    """Bit for bit; killed before the first checkpoint, and after it."""
    ours = [*flags, "--output_dir", tmp_path]
    kill = ("signal_at_step", step, int(signal.SIGKILL))
    assert stage("train_student", ours, hook=kill).code == -signal.SIGKILL
    log = stage("train_student", ours).ok().err
    assert ("as before, this run skips " + SHARD in log) == (step == 7)
    assert _losses(tmp_path) == _losses(without_shard[0])
    for name in ("model/model.safetensors", "skipped-shards.json", "heldout-after.json"):
        assert digests(tmp_path)[name] == digests(without_shard[0])[name], name


@pytest.mark.slow
def test_two_ranks_skip_the_same(
    flags: list[Any], without_shard: tuple[Path, str], tmp_path: Path
) -> None:
    """The same global batches, so the same losses; one line, of one rank."""
    log = run_python(
        [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m",
            "stages.train_student", *flags, "--output_dir", tmp_path,
            "--per_device_train_batch_size", 1,
        ],
        timeout=280,
    ).ok().err  # fmt: skip
    assert log.count("rows are skipped from step") == 1
    _nearly_same(_losses(tmp_path), _losses(without_shard[0]))


def test_a_budget_of_tokens(tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path) -> None:
    """No step above it, and the same losses however a step is divided."""
    runs = []
    for accumulation in (1, 3):
        folder = tmp_path / str(accumulation)
        sizes = (
            "--data.batch_tokens", 400, "--per_device_train_batch_size", 1,
            "--gradient_accumulation_steps", accumulation,
        )  # fmt: skip
        stage(
            "train_student",
            [*tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", folder, *sizes],
        ).ok()
        runs.append(_losses(folder))
    tokens = [values["train/tokens"] for _, values in runs[0] if "train/tokens" in values]
    assert len(tokens) == 12
    assert 200 < min(tokens) <= max(tokens) <= 400
    _nearly_same(*runs)


def test_a_budget_beside_other_sizes_is_refused(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    flags = [*tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", tmp_path]
    message = stage("train_student", [*flags, "--data.batch_tokens", 400]).refused(2)
    assert "train.per_device_train_batch_size: found 2 with data.batch_tokens" in message
    one = ("--per_device_train_batch_size", 1)
    message = stage("train_student", [*flags, *one, "--data.batch_tokens", 30]).refused(2)
    assert "data.batch_tokens is 30, but the cache has a row of" in message


def test_the_second_run_reads_its_shards_from_local_copies(
    tiny: Tiny, tiny_cache: Path, tiny_run: Path, stage: Stage, tmp_path: Path
) -> None:
    """The cache's own shards are gone meanwhile; the losses are those of a run without copies."""
    cache, copies = tmp_path / "cache", tmp_path / "copies"
    shutil.copytree(tiny_cache, cache)
    flags = [*tiny.stage_two, "--cache_dir", cache, "--data.disk_cache", copies, "--output_dir"]
    stage("train_student", [*flags, tmp_path / "first"]).ok()
    shards = list((cache / "data").rglob("*.parquet"))
    assert len(list(copies.glob("*.shard"))) == len(shards)
    for shard in shards:
        shard.unlink()
    stage("train_student", [*flags, tmp_path / "second"]).ok()
    for name in ("first", "second"):
        assert _losses(tmp_path / name) == _losses(tiny_run)


def test_a_store_that_hangs(tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path) -> None:
    """It says which file it waits for, and ends; the thread that hangs does not hold it."""
    flags = [
        *tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", tmp_path,
        "--data.stall_warning_s", 0.5, "--data.stall_timeout_s", 2,
    ]  # fmt: skip
    result = stage("train_student", flags, hook=("hanging_reads", SHARD))
    message = result.refused(4)
    assert message.startswith("no data for 2 s: reading ")
    assert SHARD in message
    assert f"waiting for data for 0.5 s: reading {tiny_cache}" in result.err
