"""What stage one refuses: one message with what was found, expected and to do; nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Stage, Tiny
from tests.stage_runner import real_stage
from tests.tiny import make_tokenizer


@pytest.fixture
def refused(stage: Stage, tiny: Tiny, tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs stage one, sees it refuse, and returns the message."""

    def run(*flags: object, code: int, **options: Any) -> str:
        cache = tmp_path / "cache"
        message = stage(
            "cache_teacher", [*tiny.stage_one, "--cache_dir", cache, *flags], **options
        ).refused(code)
        assert not cache.exists(), f"written: {sorted(cache.rglob('*'))}"
        return message

    return run


@pytest.fixture
def teacher_copy(tiny: Tiny, tmp_path: Path) -> Path:
    """Return a copy of the teacher that a test may spoil."""
    return Path(shutil.copytree(tiny.teacher, tmp_path / "teacher"))


def _corpus(tmp_path: Path, *rows: object) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_unknown_names_and_bad_values_all_at_once(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("teacher:\n  modle: x\ncapture:\n  top_k: 0\n")
    message = refused(
        "--config", file, "--capture.top_k", "0", "--max_lenght", "9", "--corpus.overlong", "cut",
        code=2,
    )  # fmt: skip
    assert message.startswith("4 mistakes in the configuration:")
    assert "--max_lenght: unknown flag; did you mean --max_length?" in message
    assert "teacher.modle: unknown field; did you mean teacher.model?" in message
    assert "capture.top_k: found 0, expected greater than or equal to 1" in message
    assert "corpus.overlong: found 'cut', expected 'truncate', 'split' or 'drop'" in message


def test_values_that_contradict_each_other(refused: Callable[..., str]) -> None:
    message = refused("--capture.shard_tokens", "64", code=2)
    assert "capture.shard_tokens: found 64, expected at least corpus.max_length (96)" in message
    message = refused("--bf16", "--fp16", code=2)
    assert "bf16 and fp16 are both on, expected at most one" in message
    message = refused("--capture.temperatures", "2", code=2)
    assert "capture.temperatures: 1.0 is missing" in message
    message = refused("--max_length", "1000", "--capture.shard_tokens", "1000", code=2)
    assert "corpus.max_length: found 1000, expected at most the teacher's 512" in message
    message = refused("--capture.top_k", "4000", code=2)
    assert "capture.top_k: found 4000, expected less than the teacher's vocabulary" in message
    message = refused("--use_flash_attention", code=2)
    assert message.startswith("use_flash_attention")
    assert "--no-use_flash_attention" in message
    through = ("--teacher.engine", "vllm", "--teacher.capture_path", "prompt_logprobs")
    assert "capture.temperatures: found [1.0, 2.0] through prompt_logprobs" in refused(
        *through, code=2
    )


def test_trackers_are_of_the_other_stage(refused: Callable[..., str]) -> None:
    message = refused("--report_to", "wandb", "--project_name", "mine", code=2)
    assert "observe.report_to: found wandb, expected none: stage one reports in its log" in message


def test_all_that_is_wrong_at_once(refused: Callable[..., str], tiny: Tiny, tmp_path: Path) -> None:
    """Model, data set, template and cache: whatever each of them lacks, and the nearest names."""
    (tmp_path / "in the way").touch()
    message = refused(
        "--max_length", "9999", "--capture.shard_tokens", "9999", "--capture.top_k", "4000",
        "--use_flash_attention", "--dataset_name", tiny.corpus.with_name("chat.jsonl"),
        "--chat_template", "no.jinja", "--cache_dir", tmp_path / "in the way" / "cache", code=2,
    )  # fmt: skip
    assert message.startswith("6 mistakes in the configuration:")
    for part in (
        f"cache_dir: found {tmp_path / 'in the way' / 'cache'}, but",
        "use_flash_attention on a machine without a GPU",
        "capture.top_k: found 4000, expected less than the teacher's vocabulary",
        "corpus.max_length: found 9999, expected at most the teacher's 512 positions",
        f"did you mean {tiny.corpus}?",
        "the chat template no.jinja cannot be read",
    ):
        assert part in message, part
    # Several that are no mistakes of the configuration: the first decides the exit code.
    message = refused(
        "--teacher_model", tiny.teacher.with_name("techer"), "--dataset_name", "no.jsonl", code=3
    )
    assert message.startswith("2 reasons why this run cannot be:")
    assert f"did you mean {tiny.teacher}?" in message
    assert "no.jsonl: no such file or folder" in message


def test_a_column_that_is_not_there_beside_a_length_that_is_too_much(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    rows = [{"talk": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    message = refused(
        "--dataset_name", _corpus(tmp_path, *rows), "--corpus.column", "tlak", "--max_length",
        "513", "--capture.shard_tokens", "600", code=2,
    )  # fmt: skip
    assert "there is no column 'tlak'; expected one of talk; did you mean talk?" in message
    assert "found 513, expected at most the teacher's 512 positions" in message


def test_a_length_that_is_not_named_is_the_teachers(
    stage: Stage, tiny: Tiny, tmp_path: Path
) -> None:
    """A missing data set is what is told, not a default above the teacher's positions."""
    flags = ["--teacher_model", tiny.teacher, "--teacher.engine", "transformers"]
    small = ["--capture.top_k", "16", "--cache_dir", tmp_path / "cache"]
    message = stage(
        "cache_teacher", [*flags, *small, "--dataset_name", tmp_path / "no.jsonl"]
    ).refused(3)
    assert message.startswith(f"{tmp_path / 'no.jsonl'}: no such file or folder")
    few = ["--capture.shard_tokens", "500"]
    message = stage("cache_teacher", [*flags, *small, *few, "--dataset_name", tiny.corpus]).refused(
        2
    )
    assert "found 500, expected at least corpus.max_length (512)" in message
    writes = ["--generate.enabled", "--generate.max_new_tokens", "500"]
    message = stage(
        "cache_teacher", [*flags, *small, *writes, "--dataset_name", tiny.corpus]
    ).refused(2)
    assert "expected together at most corpus.max_length (512)" in message
    done = stage("cache_teacher", [*flags, *small, "--dataset_name", tiny.corpus]).ok()
    assert "max_length is not set: 512 tokens (all positions of the teacher)" in done.err
    from pipeline.cache.io.reader import open_cache

    identity = open_cache(str(tmp_path / "cache")).manifest.identity
    assert identity["corpus"]["max_length"] == 512
    # The number is what is kept: the cache's own configuration and the number make it again.
    assert "max_length: 512" in (tmp_path / "cache/_meta/config.yaml").read_text()
    again = ["--dataset_name", tiny.corpus, "--max_length", "512"]
    assert "is complete" in stage("cache_teacher", [*flags, *small, *again]).ok().err


def test_what_is_left_of_the_data_is_said(stage: Stage, tiny: Tiny, tmp_path: Path) -> None:
    """How many rows num_samples leaves, and how much max_length cuts off."""
    flags = [*tiny.stage_one, "--max_length", "40", "--num_samples", "20"]
    log = stage("cache_teacher", [*flags, "--cache_dir", tmp_path / "cache"]).ok().err
    assert f"{tiny.corpus}: only the first 20 rows are read, as corpus.num_samples says" in log
    assert re.search(
        r"\d+ rows \(\d+\.\d %\) were longer than max_length 40: truncated, \d+ tokens "
        r"\(\d+\.\d %\) cut off", log,
    )  # fmt: skip
    flags = [*tiny.stage_one, "--max_length", "200", "--num_samples", "900"]
    log = stage("cache_teacher", [*flags, "--cache_dir", tmp_path / "all"]).ok().err
    assert "only the first" not in log
    assert "cut off" not in log


def test_a_configuration_file_that_is_none(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refused(
        "--config", tmp_path / "no.yaml", code=2
    )
    broken = tmp_path / "broken.yaml"
    broken.write_text("teacher: [1,\n")
    assert f"{broken}, line 2:" in refused("--config", broken, code=2)


def test_a_teacher_that_is_no_causal_lm(
    refused: Callable[..., str], teacher_copy: Path, tmp_path: Path
) -> None:
    config = json.loads((teacher_copy / "config.json").read_text())
    config |= {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    (teacher_copy / "config.json").write_text(json.dumps(config))
    message = refused("--teacher_model", teacher_copy, code=3)
    assert "its config.json names BertForMaskedLM" in message
    assert "expected a causal language model" in message
    (teacher_copy / "config.json").unlink()
    message = refused("--teacher_model", teacher_copy, code=3)
    assert "no config.json" in message
    message = refused("--teacher_model", tmp_path / "nowhere", code=3)
    assert "no such folder; expected a folder with config.json, or a hub id" in message
    message = refused("--teacher_model", "someone/no-such-model", code=3)
    assert "cannot be fetched from the hub" in message
    assert "check the name, the network, and HF_TOKEN" in message


def test_weights_that_cannot_be_read(
    stage: Stage, tiny: Tiny, teacher_copy: Path, tmp_path: Path
) -> None:
    weights = teacher_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache", "--teacher_model", teacher_copy]
    message = stage("cache_teacher", flags).refused(3)
    assert f"{teacher_copy}: transformers cannot load it" in message
    assert not list((tmp_path / "cache").glob("data/**/*"))


def test_a_tokenizer_without_chat_template_and_one_that_is_missing(
    refused: Callable[..., str], tiny: Tiny, teacher_copy: Path
) -> None:
    (teacher_copy / "chat_template.jinja").unlink()
    message = refused("--teacher_model", teacher_copy, code=3)
    assert "chat template" in message
    assert "--chat_template" in message
    (teacher_copy / "tokenizer.json").unlink()
    message = refused("--teacher_model", teacher_copy, code=3)
    assert "no usable tokenizer" in message
    assert "expected tokenizer.json beside the weights" in message
    assert make_tokenizer(tiny.corpus, template=None).chat_template is None


def test_an_empty_corpus_and_columns_that_fit_nothing(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    message = refused("--dataset_name", _corpus(tmp_path), code=3)
    assert "holds no rows" in message
    assert "expected at least one row" in message
    message = refused("--dataset_name", _corpus(tmp_path, {"frage": "a", "antwort": "b"}), code=3)
    assert "the columns fit no known format: frage (str), antwort (str)" in message
    assert "expected sharegpt" in message
    assert "--corpus.format" in message
    rows = [{"messages": [{"role": "user", "content": "only a question"}]}] * 3
    message = refused("--dataset_name", _corpus(tmp_path, *rows), code=3)
    assert "none of its 3 rows gave a sample" in message
    rows = [{"text": "something to read"}]
    everything = ["--corpus.heldout_fraction", "0.999999"]
    message = refused("--dataset_name", _corpus(tmp_path, *rows), *everything, code=3)
    assert "held out" in message
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n{"text": \n')
    message = refused("--dataset_name", tmp_path / "corpus.jsonl", code=3)
    assert "corpus.jsonl, line 2" in message


def test_a_dataset_that_cannot_be_reached(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused("--dataset_name", tmp_path / "no.jsonl", code=3)
    assert "no such file or folder" in message
    message = refused("--dataset_name", "someone/no-such-set", code=3)
    assert "the hub dataset someone/no-such-set, split train cannot be loaded" in message
    assert "check the network (and HF_HUB_OFFLINE)" in message
    message = refused("--dataset_name", "s4://bucket/chats.jsonl", code=3)
    assert "s4" in message


def test_too_little_memory_and_disk(refused: Callable[..., str]) -> None:
    message = refused(code=4, hook=("little_memory", 1 << 29))
    assert "the plan needs about" in message
    assert "512 MiB are free" in message
    assert "use a smaller teacher" in message
    message = refused(code=4, hook=("little_disk", 1000))
    assert "are free at" in message
    assert "--cache_dir" in message
    # The plan says so as well, after what it could tell.
    assert "the plan needs about" in refused("--dry-run", code=4, hook=("little_memory", 1 << 29))


def test_a_disk_that_fills_up_on_the_way(stage: Stage, tiny: Tiny, tmp_path: Path) -> None:
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache"]
    message = stage("cache_teacher", flags, hook=("full_disk", "train/00002")).refused(4)
    assert "the disk is full" in message
    assert "run the same command again; it goes on where it stopped" in message
    assert not (tmp_path / "cache/_meta/shards/train-00002.parquet").exists()
    assert not (tmp_path / "cache/_meta/manifest.json").exists()
    assert not list((tmp_path / "cache").rglob("*.partial"))
    # What was made before stays, and is not made again when there is room.
    kept = list((tmp_path / "cache/data").rglob("*.parquet"))
    times = {file: file.stat().st_mtime_ns for file in kept}
    stage("cache_teacher", flags).ok()
    assert times == {file: file.stat().st_mtime_ns for file in kept}
    assert (tmp_path / "cache/_meta/manifest.json").exists()


def test_a_folder_that_cannot_be_written(stage: Stage, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "file" / "cache"]
    message = stage("cache_teacher", flags).refused(4)
    assert "file" in message
    message = stage("cache_teacher", [*flags, "--cache_dir", "s4://bucket/cache"]).refused(4)
    assert "s4" in message


def test_a_teacher_that_is_broken_is_named_by_sample(
    stage: Stage, tiny: Tiny, teacher_copy: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(teacher_copy / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(weights, teacher_copy / "model.safetensors", metadata={"format": "pt"})
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache", "--teacher_model", teacher_copy]
    message = stage("cache_teacher", flags).refused(3)
    assert message.startswith("the teacher answers for no row; of sample ")
    assert "are not finite; expected finite logits" in message
    assert not list((tmp_path / "cache/_meta").glob("quarantine/*"))
    assert not list((tmp_path / "cache/data").rglob("*.parquet"))
    assert not (tmp_path / "cache/_meta/manifest.json").exists()


def test_the_real_command_refuses_in_one_line(tiny: Tiny, tmp_path: Path) -> None:
    flags = [*tiny.stage_one, "--cache_dir", tmp_path / "cache", "--capture.topk", "3"]
    result = real_stage("cache_teacher", flags)
    message = result.refused(2)
    assert message.startswith("--capture.topk: unknown flag; did you mean --capture.top_k?")
    assert result.out == ""
    assert len(result.err.splitlines()) == 1
