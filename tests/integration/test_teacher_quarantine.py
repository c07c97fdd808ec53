"""Rows that the teacher cannot answer are quarantined; the rest is as if they were not planned."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.__main__ import main as cache_command
from pipeline.cache.io.reader import open_cache
from pipeline.cache.layout.fold import reopen
from pipeline.errors import RowsQuarantined
from pipeline.storage import Store
from tests.conftest import Stage, Tiny, digests
from tests.stage_runner import Result, Running
from tests.tiny import make_teacher, make_tokenizer

DONE_WITHOUT = RowsQuarantined.exit_code
pytestmark = pytest.mark.slow  # each test runs stage one several times


def _ids(cache: Path, split: str = "train") -> list[list[str]]:
    """Return the sample ids of each shard."""
    source = open_cache(str(cache)).source(split)
    return [
        [row.sample_id for row in source.read_rows(shard, range(rows))]
        for shard, rows in enumerate(source.shard_rows())
    ]


def _cache_digests(folder: Path) -> dict[str, str]:
    """Return the digests of a cache but for the two texts in which its folder's name stands."""
    found = digests(folder)
    for name in ("README.md", "_meta/config.yaml"):
        del found[name]
    return found


def _run(
    stage: Stage, tiny: Tiny, folder: Path, *flags: object, hook: tuple[Any, ...] = ()
) -> Result:
    return stage("cache_teacher", [*tiny.stage_one, "--cache_dir", folder, *flags], hook=hook)


def _is_complete_without(cache: Path, whole: Path, lost: Sequence[str], shard: int) -> None:
    """Check everything that a reader sees of a cache that lost rows of one training shard."""
    assert cache_command(["verify", str(cache)]) == 0
    assert open_cache(str(cache)).manifest.corpus_counts["rows_quarantined"] == len(lost)
    expected = [[name for name in names if name not in lost] for names in _ids(whole)]
    assert _ids(cache) == expected
    here, there = digests(cache / "data"), digests(whole / "data")
    changed = {name for name in there if here[name] != there[name]}
    assert changed == {f"train/{shard:05d}.parquet"}


@pytest.mark.parametrize("kind", ["raises", "nan"])
def test_a_row_that_fails_is_quarantined_and_can_be_made_again(
    kind: str, tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    folder, lost = tmp_path / "cache", _ids(tiny_cache)[2][1]
    first = _run(stage, tiny, folder, hook=("poison", kind, [lost]))
    message = first.refused(DONE_WITHOUT)
    what = {"raises": "RuntimeError: index out of range", "nan": "position 1 are not finite"}[kind]
    assert f"  - sample {lost} (train/00002), 3 tries: " in message
    assert what in message
    assert "complete but for 1 of 56 rows" in message
    assert "--retry-quarantined" in message
    assert "56 of" not in first.out
    _is_complete_without(folder, tiny_cache, [lost], 2)
    before = _cache_digests(folder)
    # The same command again makes nothing, loads no teacher, and says the same.
    assert _run(stage, tiny, folder, hook=("forbid_loading",)).refused(DONE_WITHOUT) == message
    assert _cache_digests(folder) == before
    # It still fails: the same bytes, the same list.
    again = _run(stage, tiny, folder, "--retry-quarantined", hook=("poison", kind, [lost]))
    assert again.refused(DONE_WITHOUT) == message
    assert _cache_digests(folder) == before
    untouched = folder / "data/train/00001.parquet"
    time = untouched.stat().st_mtime_ns
    _run(stage, tiny, folder, "--retry-quarantined").ok()
    assert _cache_digests(folder) == _cache_digests(tiny_cache)
    assert untouched.stat().st_mtime_ns == time, "exactly the shard with the row is made again"


@pytest.mark.parametrize("kind", ["raises", "nan"])
def test_a_failure_that_passes_leaves_no_trace(
    kind: str, tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    lost = _ids(tiny_cache)[2][1]
    _run(stage, tiny, tmp_path / "cache", hook=("poison", kind, [lost], 2)).ok()
    assert _cache_digests(tmp_path / "cache") == _cache_digests(tiny_cache)


def test_several_workers_agree_on_what_is_quarantined(
    tiny: Tiny, tiny_cache: Path, stage: Stage, start: Callable[..., Running], tmp_path: Path
) -> None:
    ids = _ids(tiny_cache)
    lost = [ids[0][0], ids[2][1], ids[2][0], ids[3][-1]]
    flags = ["--capture.max_quarantined_fraction", "0.2", "--capture.lease_s", "1.5"]
    hook = ("poison", "raises", lost)
    alone = _run(stage, tiny, tmp_path / "alone", *flags, hook=hook)
    assert "complete but for 4 of 56 rows" in alone.refused(DONE_WITHOUT)
    together = [*tiny.stage_one, "--cache_dir", tmp_path / "together", *flags]
    workers = [start("cache_teacher", together, hook=hook) for _ in range(3)]
    for worker in workers:
        assert "complete but for 4 of 56 rows" in worker.wait().refused(DONE_WITHOUT)
    assert _cache_digests(tmp_path / "together") == _cache_digests(tmp_path / "alone")


def test_a_row_that_kills_its_process_is_found(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    folder, lost = tmp_path / "cache", _ids(tiny_cache)[2][1]
    ends = []
    while len(ends) < 9:
        result = _run(stage, tiny, folder, "--capture.tries", "2", hook=("poison", "kills", [lost]))
        ends.append(result.code)
        if result.code != -signal.SIGKILL:
            break
    # Two tries of the shard, then two of the row.
    assert ends == [-signal.SIGKILL] * 4 + [DONE_WITHOUT]
    message = result.refused(DONE_WITHOUT)
    assert f"  - sample {lost} (train/00002), 2 tries: the process died while" in message
    _is_complete_without(folder, tiny_cache, [lost], 2)
    assert not list((folder / "_meta/leases").iterdir())
    _run(stage, tiny, folder, "--retry-quarantined").ok()
    assert _cache_digests(folder) == _cache_digests(tiny_cache)


def test_a_row_that_breaks_the_engine_for_good_is_found(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    folder, lost = tmp_path / "cache", _ids(tiny_cache)[2][1]
    _run(stage, tiny, folder).ok()  # so that there are other shards to tell the engine by
    reopen(Store(str(folder)), [("train", 2)])
    messages = []
    for _ in range(9):
        result = _run(
            stage, tiny, folder, "--capture.tries", "2", hook=("poison", "breaks", [lost])
        )
        messages.append(result.refused(result.code))
        if "complete but for" in messages[-1]:
            break
    assert f"  - sample {lost} (train/00002), 2 tries: " in messages[-1]
    assert all("the teacher answers for no row" in message for message in messages[:-1])
    _is_complete_without(folder, tiny_cache, [lost], 2)


def test_an_engine_that_fails_for_every_row_quarantines_nothing(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    flags = ["--capture.max_quarantined_fraction", "1"]
    for kind in ("raises", "nan"):
        message = _run(stage, tiny, folder, *flags, hook=("poison", kind, [])).refused(3)
        assert message.startswith("the teacher answers for no row; of sample ")
        assert not list((folder / "_meta").glob("quarantine/*"))
        assert not list((folder / "_meta/shards").glob("*"))
    _run(stage, tiny, folder).ok()
    assert _cache_digests(folder) == _cache_digests(tiny_cache)


def test_too_many_rows_stop_the_run(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    folder, lost = tmp_path / "cache", [names[0] for names in _ids(tiny_cache)]
    assert len(lost) > 2
    message = _run(stage, tiny, folder, hook=("poison", "nan", lost)).refused(3)
    assert message.startswith("2 of 56 rows fail, the last of them sample ")
    assert "expected at most 1 (capture.max_quarantined_fraction)" in message
    assert len(list((folder / "_meta").glob("quarantine/*"))) == 1
    assert not (folder / "_meta/manifest.json").exists()


def test_a_shard_that_loses_all_its_rows(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    folder, lost = tmp_path / "cache", _ids(tiny_cache)[2]
    flags = ["--capture.max_quarantined_fraction", "0.5"]
    message = _run(stage, tiny, folder, *flags, hook=("poison", "nan", lost)).refused(DONE_WITHOUT)
    assert f"complete but for {len(lost)} of 56 rows" in message
    _is_complete_without(folder, tiny_cache, lost, 2)
    trained = ["--cache_dir", folder, "--output_dir", tmp_path / "student"]
    stage("train_student", [*tiny.stage_two, *trained]).ok()


def test_a_list_that_is_lost_or_damaged_makes_its_shard_again(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    lost = _ids(tiny_cache)[2][1]
    made = tmp_path / "cache"
    _run(stage, tiny, made, hook=("poison", "raises", [lost])).refused(DONE_WITHOUT)
    for name, spoil in (
        ("gone", lambda file: file.unlink()),
        ("damaged", lambda file: file.write_bytes(file.read_bytes()[:-9])),
        ("other", lambda file: file.write_text(file.read_text().replace(lost, "0" * 32))),
    ):
        folder = Path(shutil.copytree(made, tmp_path / name))
        spoil(folder / "_meta/quarantine/train-00002.json")
        _run(stage, tiny, folder).ok()
        assert _cache_digests(folder) == _cache_digests(tiny_cache), name


def test_a_real_teacher_with_a_poisoned_embedding(
    tiny: Tiny, stage: Stage, start: Callable[..., Running], tmp_path: Path
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    rows = tiny.corpus.read_text().splitlines()
    answer = {"role": "assistant", "content": "see \u03a9 there."}
    rows[20:20] = [json.dumps({"messages": [{"role": "user", "content": "what?"}, answer]})]
    (tmp_path / "corpus").mkdir()
    corpus = tmp_path / "corpus/chats.jsonl"
    corpus.write_text("\n".join(rows) + "\n")
    tokenizer = make_tokenizer(tiny.corpus)
    teacher = make_teacher(tmp_path / "teacher", tokenizer)
    model = LlamaForCausalLM.from_pretrained(teacher)
    weight = model.get_input_embeddings().weight.detach()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(weight.clone())
    only_there = set(tokenizer("\u03a9")["input_ids"]) - set(
        tokenizer("\n".join(rows[:20]))["input_ids"]
    )
    with torch.no_grad():
        weight[sorted(only_there)] = float("nan")
    model.save_pretrained(teacher)
    flags = [*tiny.stage_one, "--teacher_model", teacher, "--dataset_name", corpus]
    message = stage("cache_teacher", [*flags, "--cache_dir", tmp_path / "one"]).refused(
        DONE_WITHOUT
    )
    assert "complete but for 1 of 57 rows" in message
    assert "are not finite" in message
    workers = [start("cache_teacher", [*flags, "--cache_dir", tmp_path / "two"]) for _ in range(2)]
    for worker in workers:
        assert "complete but for 1 of 57 rows" in worker.wait().refused(DONE_WITHOUT)
    assert _cache_digests(tmp_path / "one") == _cache_digests(tmp_path / "two")
