"""The teacher writes its own responses: the same tokens whatever happens to it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.io.reader import open_cache
from tests.conftest import Stage, Tiny, digests
from tests.responses import RESPONSES, cached_rows, content_digests, response_rows
from tests.stage_runner import Running, real_stage, run_python
from tests.tiny import TALKER_ENDS, TALKER_VOCABULARY


def test_the_cache_holds_exactly_what_was_sampled(written: Path, tiny_cache: Path) -> None:
    responses, cached = response_rows(written), cached_rows(written)
    assert responses.keys() == cached.keys()
    assert len(responses) == 72
    for name, row in cached.items():
        ids = responses[name]["token_ids"]
        assert row.input_ids_L[-len(ids) :].tolist() == ids
        assert row.loss_mask_L.tolist() == [False] * (row.input_ids_L.size - len(ids)) + [
            True
        ] * len(ids)
        assert row.input_ids_L.size <= 96
        # Rows that only pad the head are never drawn, though a random teacher likes them.
        assert max(ids) < TALKER_VOCABULARY
        # Once ended, nothing follows; what did not end ran into the limit.
        assert not set(ids[:-1]) & {2, *TALKER_ENDS}
        assert responses[name]["finished"] == (ids[-1] in {2, *TALKER_ENDS})
        assert responses[name]["finished"] or len(ids) == 14
        # What the capture says of each token is what it was drawn with (stored in steps of 6 %).
        np.testing.assert_allclose(
            row.targets.label_logprob_N, responses[name]["logprobs"], rtol=0.031, atol=2e-3
        )
        np.testing.assert_allclose(
            row.targets.written_logprob_N, responses[name]["logprobs"], rtol=0, atol=1 / 2048
        )
        # The ids that it found likeliest are entries; they are the teacher's own here.
        likeliest = np.reshape(responses[name]["top_ids"], (len(ids), 3))
        assert likeliest.max() < TALKER_VOCABULARY
        for n, top_ids in enumerate(likeliest.tolist()):
            own, values = row.targets.entries(n)
            assert set(top_ids) <= set(own.tolist())
            inside = [value for token, value in zip(own, values, strict=True) if token in top_ids]
            # In the steps of stored values, which are finer for what held-out rows keep anyway.
            assert min(inside) > 1.03 * np.sort(values[own < TALKER_VOCABULARY])[-3] - 1e-6
    finished = sum(row["finished"] for row in responses.values())
    assert 10 < finished < 72
    # Several responses to a prompt are several draws.
    texts = {(row["prompt"], row["response"]) for row in responses.values()}
    assert len(texts) == 72
    assert len({row["prompt"] for row in responses.values()}) == 36
    assert not responses.keys() & cached_rows(tiny_cache).keys()


def test_it_says_whose_the_responses_are(written: Path) -> None:
    manifest = open_cache(str(written)).manifest
    told = manifest.corpus_counts
    responses = response_rows(written)
    assert told["responses"] == 72
    assert told["responses_unfinished"] == sum(not row["finished"] for row in responses.values())
    line = (
        "written by the teacher itself (temperature 0.9, top-p 0.95, seed 42): 72 responses, "
        f"{told['loss_tokens']} tokens, {told['responses_unfinished']} cut off at 14; "
        "text in `_meta/responses`"
    )
    assert f"| responses | {line} |" in (written / "README.md").read_text()
    shown = run_python(["-m", "pipeline.cache", "inspect", written]).ok().out
    assert f"responses    {line}" in shown
    assert "intact" in run_python(["-m", "pipeline.cache", "verify", written]).ok().out
    assert manifest.total().loss_tokens == told["loss_tokens"]


@pytest.mark.slow
def test_the_same_bytes_by_the_command_as_it_is_typed(
    writing: list[Any], written: Path, tmp_path: Path
) -> None:
    real_stage("cache_teacher", [*writing, "--cache_dir", tmp_path / "cache"]).ok()
    assert content_digests(tmp_path / "cache") == content_digests(written)


def test_two_workers_write_what_one_writes(
    writing: list[Any], written: Path, start: Callable[..., Running], tmp_path: Path
) -> None:
    every = [*writing, "--cache_dir", tmp_path / "cache", "--capture.lease_s", "1.5"]
    for worker in [start("cache_teacher", every) for _ in range(2)]:
        worker.wait().ok()
    assert content_digests(tmp_path / "cache") == content_digests(written)
    assert not list((tmp_path / "cache/_meta/leases").glob("*"))


# 2 syncs a write: the prompts are 1 to 8, the plan of the responses 9 and 10; then a file and the
# two files of samples and the summary of its unit, for each of four shards; the capture is from 45.
@pytest.mark.parametrize(
    "sync",
    [9, 11, 15, 17, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 7, 13, 19, 28, 43, 49))],
)
def test_killed_in_the_middle_of_a_write(
    sync: int, writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    every = [*writing, "--cache_dir", tmp_path / "cache"]
    killed = stage("cache_teacher", every, hook=("kill_at_sync", sync))
    assert killed.code == -signal.SIGKILL, killed
    stage("cache_teacher", every).ok()
    assert content_digests(tmp_path / "cache") == content_digests(written)


def test_killed_while_the_teacher_writes(
    writing: list[Any], written: Path, start: Callable[..., Running], stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    running = start("cache_teacher", [*writing, "--cache_dir", folder])
    _until(lambda: list((folder / RESPONSES).glob("*.parquet")))
    os.kill(running.process.pid, signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    before = {file.name: file.stat().st_mtime_ns for file in (folder / RESPONSES).iterdir()}
    stage("cache_teacher", [*writing, "--cache_dir", folder]).ok()
    assert content_digests(folder) == content_digests(written)
    for name, stamp in before.items():
        if name.endswith(".parquet"):
            assert (folder / RESPONSES / name).stat().st_mtime_ns == stamp, "written again"


def test_a_paused_worker_is_overtaken_and_its_tokens_do_no_harm(
    writing: list[Any], written: Path, start: Callable[..., Running], tmp_path: Path
) -> None:
    every = [*writing, "--cache_dir", tmp_path / "cache", "--capture.lease_s", "1.5"]
    # Draws of its own: had its file replaced the other's, the tokens would show it.
    mark = tmp_path / "begun"
    hook = ("hooks", ("other_draws",), ("slow_writing", str(mark), 0.5))
    paused = start("cache_teacher", every, hook=hook)
    _until(mark.exists)
    os.kill(paused.process.pid, signal.SIGSTOP)
    start("cache_teacher", every).wait().ok()
    os.kill(paused.process.pid, signal.SIGCONT)
    assert "was written by another worker; its tokens count" in paused.wait().ok().err
    assert content_digests(tmp_path / "cache") == content_digests(written)


def _until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 100
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.slow
def test_two_workers_write_on_a_store_that_fails_one_call_in_ten(
    writing: list[Any], written: Path, start: Callable[..., Running], tmp_path: Path
) -> None:
    every = [*writing, "--cache_dir", f"faulty://{tmp_path}/cache", "--capture.lease_s", "5"]
    hook = ("faulty_store", 0.1, 0.0)
    for worker in [start("cache_teacher", every, hook=hook) for _ in range(2)]:
        worker.wait(200).ok()
    assert content_digests(tmp_path / "cache") == content_digests(written)


@pytest.mark.parametrize("kills", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_prompts_of_many_units_are_answered_while_others_are_prepared(
    kills: int, writing: list[Any], start: Callable[..., Running], stage: Stage, tmp_path: Path
) -> None:
    flags = [*writing, "--corpus.unit_mib", "0.002", "--generate.shard_prompts", "6"]
    one = tmp_path / "one"
    units = ("note_units", os.devnull)  # prepared on a thread: no process is started for each
    folds = ("replace_name", "pipeline.corpus.prepared.folder", "FOLD", 2)
    out = stage("cache_teacher", [*flags, "--cache_dir", one], hook=("hooks", units, folds)).ok()
    assert "72/72 responses" in out.err
    assert len(list((one / RESPONSES).glob("*.parquet"))) == 6
    assert list((one / RESPONSES / "units/summaries").glob("*.zst"))
    assert list((one / "_meta/corpus").rglob("summaries/*.zst"))
    two = tmp_path / "two"
    every = [*flags, "--cache_dir", two, "--capture.lease_s", "1.5"]
    for kill in range(kills):
        hook = ("hooks", units, folds, ("kill_at_sync", 30 + 14 * kill))
        stage("cache_teacher", every, hook=hook)
    for worker in [start("cache_teacher", every, hook=("hooks", units, folds)) for _ in range(2)]:
        worker.wait().ok()
    assert content_digests(two) == content_digests(one)
    assert not list((two / "_meta/leases").glob("*"))


def test_sigterm_lets_go_and_says_how_to_go_on(
    writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    every = [*writing, "--cache_dir", tmp_path / "cache"]
    result = stage("cache_teacher", every, hook=("signal_at_sync", 11, int(signal.SIGTERM)))
    assert result.refused(143).startswith("stopped by SIGTERM; run the same command again")
    leases = list((tmp_path / "cache/_meta/leases").glob("*.json"))
    assert leases
    assert all(json.loads(file.read_text())["state"] == "given up" for file in leases)
    stage("cache_teacher", every).ok()
    assert content_digests(tmp_path / "cache") == content_digests(written)


def test_other_settings_are_refused_at_once(
    writing: list[Any], tiny: Tiny, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    begun = stage("cache_teacher", [*writing, "--cache_dir", folder], hook=("kill_at_sync", 13))
    assert begun.code == -signal.SIGKILL
    before = digests(folder)
    for changed, told in [
        (["--generate.temperature", "0.8"], "corpus.generate.temperature: 0.9 there, 0.8 asked"),
        (["--generate.shard_prompts", "9"], "corpus.generate.shard_prompts: 10 there, 9 asked"),
        (["--seed", "7"], "corpus.seed: 42 there, 7 asked"),
        (["--capture.top_k", "8"], "scheme.top_k: 16 there, 8 asked"),
        (["--no-generate.enabled"], "responses: the teacher's there, the corpus's asked for"),
    ]:
        every = [*writing, "--cache_dir", folder, *changed]
        message = stage("cache_teacher", every, hook=("forbid_loading",)).refused(3)
        assert "holds a cache of another identity" in message
        assert told in message
        assert digests(folder) == before
    # A cache of the corpus's own text is no place for the teacher's.
    plain = tmp_path / "plain"
    begun = stage(
        "cache_teacher", [*tiny.stage_one, "--cache_dir", plain], hook=("kill_at_sync", 12)
    )
    assert begun.code == -signal.SIGKILL
    before = digests(plain)
    every = [*writing, "--cache_dir", plain]
    message = stage("cache_teacher", every, hook=("forbid_loading",)).refused(3)
    assert "responses: the corpus's there, the teacher's asked for" in message
    assert digests(plain) == before


def test_a_complete_cache_loads_no_teacher(writing: list[Any], written: Path, stage: Stage) -> None:
    before = digests(written)
    result = stage(
        "cache_teacher", [*writing, "--cache_dir", written], hook=("forbid_loading",)
    ).ok()
    assert "is complete" in result.err
    assert digests(written) == before


def test_dry_run(writing: list[Any], written: Path, stage: Stage, tmp_path: Path) -> None:
    every = [*writing, "--cache_dir", tmp_path / "cache", "--dry-run"]
    out = stage("cache_teacher", every, hook=("forbid_writing",)).ok().out
    prompts = sum(len(ids) for ids in _prompt_ids(written)) // 2
    assert f"prompts      36, {prompts} tokens, 2 responses each" in out
    assert f"to write     at most {72 * 14} tokens, 4 shards of responses, 0 of them done" in out
    assert f"tokens       at most {2 * prompts + 72 * 14}, {72 * 14} supervised; " in out
    assert "shards       at most " in out
    assert "the writing comes before it, not timed" in out
    assert not (tmp_path / "cache").exists()
    # With the responses there, it is the plan itself.
    before = digests(written)
    out = stage("cache_teacher", [*writing, "--cache_dir", written, "--dry-run"]).ok().out
    manifest = open_cache(str(written)).manifest
    total = manifest.total()
    assert f"tokens       {total.tokens}, {total.loss_tokens} supervised" in out
    assert f"shards       {total.shards}, {total.shards} of them done" in out
    assert "at most" not in out
    assert digests(written) == before


def test_what_cannot_fit_is_said_before_a_token_is_written(
    writing: list[Any], stage: Stage, tmp_path: Path
) -> None:
    every = [*writing, "--cache_dir", tmp_path / "cache"]
    message = stage("cache_teacher", every, hook=("little_memory", 1 << 20)).refused(4)
    assert message.startswith("the plan needs about 1 GiB of memory")
    assert not (tmp_path / "cache").exists()


def _prompt_ids(folder: Path) -> list[Any]:
    return [row.input_ids_L[~row.loss_mask_L] for row in cached_rows(folder).values()]


def test_a_student_learns_from_it(
    tiny: Tiny, talker: Path, written: Path, stage: Stage, tmp_path: Path
) -> None:
    """By the policy gradient of what was written: a pruned writer comes nearer to itself."""
    every = [
        *tiny.stage_two, "--student_model", talker, "--max_steps", "6", "--temperature", "1",
        "--loss.divergence", "sampled_reverse_kl",
    ]  # fmt: skip
    folder = tmp_path / "student"
    stage("train_student", [*every, "--cache_dir", written, "--output_dir", folder]).ok()
    before, after = (
        json.loads((folder / f"heldout-{when}.json").read_text()) for when in ("before", "after")
    )
    assert before != after
    assert sum(before["sums"]["written_drift"]) > 0.1 * sum(before["loss_tokens"])
    assert sum(after["sums"]["kl"]) < sum(before["sums"]["kl"])
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("train/sampled_reverse_kl" in one for one in logged)
    assert any("heldout/written_drift" in one for one in logged)
    assert (folder / "model/model.safetensors").exists()


def test_prompts_are_prepared_apart(
    writing: list[Any], written: Path, stage: Stage, tmp_path: Path
) -> None:
    every = [*writing, "--cache_dir", tmp_path / "cache"]
    out = stage("prepare_corpus", every).ok().out
    assert re.search(r"36 prompts \(\d+ train, \d+ held out\)", out)
    before = digests(tmp_path / "cache")
    assert all(name.startswith("_meta/corpus/") for name in before)
    log = tmp_path / "units"
    stage("cache_teacher", every, hook=("note_units", str(log))).ok()
    assert not log.exists(), "no unit is prepared again"
    assert content_digests(tmp_path / "cache") == content_digests(written)


def test_documents_begin_and_the_teacher_goes_on(
    tiny: Tiny, talker: Path, stage: Stage, tmp_path: Path
) -> None:
    file = tmp_path / "texts.jsonl"
    texts = [f"list {n} of numbers returns value when called" for n in range(12)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    every = [
        *tiny.stage_one, "--teacher_model", talker, "--dataset_name", file, "--generate.enabled",
        "--generate.max_new_tokens", "6", "--generate.prompt_tokens", "4",
        "--cache_dir", tmp_path / "cache",
    ]  # fmt: skip
    stage("cache_teacher", every).ok()
    rows = cached_rows(tmp_path / "cache")
    assert len(rows) == 12
    assert all((~row.loss_mask_L).sum() == 4 for row in rows.values())
    prompts = {row["prompt"] for row in response_rows(tmp_path / "cache").values()}
    assert all(any(text.startswith(prompt) for text in texts) for prompt in prompts)
