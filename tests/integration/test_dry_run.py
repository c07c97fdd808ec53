"""--dry-run prints what a stage would take and writes nothing."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.amounts import BYTES_PER_TOKEN
from pipeline.cache.io.reader import open_cache
from tests.conftest import Stage, Tiny, digests

SIZE = r"[\d.]+ (?:bytes|[KMGT]iB)"


def _plan(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)  +(.*)$", text, re.MULTILINE))


def test_stage_one(tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path) -> None:
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache", "--dry-run"]
    plan = _plan(stage("cache_teacher", flags).ok().out)
    shards = open_cache(str(tiny_cache)).records()
    train, heldout = (
        sum(r.rows for r in shards if r.split == name) for name in ("train", "heldout")
    )
    tokens, loss_tokens = sum(r.tokens for r in shards), sum(r.loss_tokens for r in shards)
    assert plan["samples"] == f"{train + heldout} ({train} train, {heldout} held out)"
    assert plan["tokens"].startswith(f"{tokens}, {loss_tokens} supervised; ")
    assert plan["shards"].startswith(f"{len(shards)}, 0 of them done, at {tmp_path / 'cache'}")
    assert re.fullmatch(rf"about {SIZE}, \d+\.\d {BYTES_PER_TOKEN}", plan["cache"])
    assert re.fullmatch(rf"about {SIZE}, {SIZE} free", plan["memory"])
    assert re.fullmatch(r"about [\d.]+ (?:s|min) at \d+ tokens/s \(timing run\)", plan["time"])
    assert str(tiny.teacher) in plan["teacher"]
    assert re.fullmatch(r"transformers [\d.]+, float32 on cpu", plan["engine"])
    assert not (tmp_path / "cache").exists()
    # Beside a finished cache it counts what is done, and touches nothing.
    before = digests(tiny_cache)
    flags = [*tiny.stage_one, "--cache_dir", tiny_cache, "--dry-run"]
    plan = _plan(stage("cache_teacher", flags).ok().out)
    assert plan["shards"].startswith(f"{len(shards)}, {len(shards)} of them done")
    assert digests(tiny_cache) == before


def test_the_estimate_of_the_caches_size_is_near(tiny: Tiny, tiny_cache: Path) -> None:
    from pipeline.corpus.settings import CorpusSettings
    from pipeline.teacher.estimate import estimate
    from pipeline.teacher.prepare import prepare
    from pipeline.teacher.settings import CaptureSettings, TeacherSettings

    teacher = TeacherSettings(model=str(tiny.teacher), engine="transformers", batch_tokens=256)
    corpus = CorpusSettings(dataset_name=str(tiny.corpus), max_length=96, heldout_fraction=0.25)
    capture = CaptureSettings(top_k=16, shard_tokens=500)
    prepared = prepare(teacher, corpus, capture, seed=42, cache_url=str(tiny_cache))
    prepared.capture.source.refresh()
    plan = estimate(prepared.capture)
    shards = open_cache(str(tiny_cache)).records()
    assert (plan.shards, plan.tokens) == (len(shards), sum(r.tokens for r in shards))
    # Shards this small carry the footer's weight as well.
    assert 0.4 < plan.cache_bytes / sum(record.bytes for record in shards) < 2.5


def test_stage_two(tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path) -> None:
    before = digests(tiny_cache)
    flags = [*tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", tmp_path / "student"]
    plan = _plan(stage("train_student", [*flags, "--dry-run"]).ok().out)
    shards = open_cache(str(tiny_cache)).manifest.of_split("train")
    rows, tokens = sum(r.rows for r in shards), sum(r.tokens for r in shards)
    assert "layers [0, 3]" in plan["student"]
    assert plan["samples"] == f"{rows}, {tokens} tokens an epoch"
    assert plan["steps"] == "12 of 2 packs"
    assert re.fullmatch(r"\d+\.\d % of the capacity used", plan["packing"])
    assert re.fullmatch(rf"about {SIZE}, {SIZE} free", plan["memory"])
    assert re.fullmatch(rf"about {SIZE} at {tmp_path / 'student'}", plan["disk"])
    assert re.fullmatch(r"about [\d.]+ (?:s|min) at \d+ GFLOP/s \(calibrated\)", plan["time"])
    assert not (tmp_path / "student").exists()
    assert digests(tiny_cache) == before
    # Epochs instead of steps.
    epochs = [*flags, "--max_steps", "none", "--num_train_epochs", "2", "--dry-run"]
    steps = int(_plan(stage("train_student", epochs).ok().out)["steps"].split()[0])
    assert steps >= 2 * tokens / (2 * 96)


def test_a_forecast_for_devices_that_are_not_here(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    flags = [*tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", tmp_path / "student"]
    plan = _plan(stage("train_student", [*flags, "--dry-run", "--device", "H100"]).ok().out)
    assert plan["devices"] == "1 x H100 80 GB, by arithmetic: nothing was run on them"
    assert re.match(rf"about {SIZE} of 72.7 GiB a device: ", plan["memory"])
    assert "at 35 % of the devices' peak (989 TFLOP/s in bfloat16)" in plan["time"]
    # The steps are of as many processes as devices.
    one = int(plan["steps"].split()[2])
    many = [*flags, "--dry-run", "--device", "h200", "--devices", "4"]
    plan = _plan(stage("train_student", many).ok().out)
    assert int(plan["steps"].split()[2]) == 4 * one
    assert "(3956 TFLOP/s" in plan["time"]
    assert not (tmp_path / "student").exists()
    message = stage("train_student", [*flags, "--dry-run", "--device", "h10"]).refused(2)
    assert "forecast.device: found 'h10', expected one of a10g, l4, " in message
    assert "did you mean h100?" in message
    message = stage("train_student", [*flags, "--device", "h100"]).refused(2)
    assert "found h100 without --dry-run; expected both" in message
    message = stage("train_student", [*flags, "--dry-run", "--devices", "8"]).refused(2)
    assert "found 8 without device, expected its name" in message
