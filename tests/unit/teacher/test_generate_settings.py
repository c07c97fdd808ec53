"""What the section `generate` takes, and what it refuses in words."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.api.settings import TeacherRun
from pipeline.config import parse_command
from pipeline.errors import ConfigError
from pipeline.teacher.generation.settings import GenerateSettings, mistakes_with_corpus


def _run(*flags: str) -> TeacherRun:
    return parse_command(TeacherRun, list(flags), prog="p", description="").settings


def test_it_is_off_unless_asked_for() -> None:
    assert not _run().generate.enabled
    # What does not matter is not refused: a short corpus without generation.
    assert _run("--max_length", "64").generate.max_new_tokens == 512


def test_a_writer_is_not_named_in_vain() -> None:
    """Found as a cache of the corpus's text, made after `--generate.writer` alone."""
    with pytest.raises(ConfigError) as caught:
        _run("--generate.writer", "small", "--generate.record_top_k", "4")
    assert "generate.writer: found small without generate.enabled" in str(caught.value)
    assert "generate.record_top_k: found 4 without generate.enabled" in str(caught.value)
    # Switched off in so many words it may stay, as in a file that several runs share.
    assert not _run("--generate.writer", "small", "--generate.enabled", "false").generate.enabled


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", "-0.1", "expected greater than or equal to 0"),
        ("temperature", "5.5", "expected less than or equal to 5"),
        ("temperature", ".nan", "generate.temperature: found nan"),
        ("temperature", "0.001", "expected 0 or at least 0.01"),
        ("top_p", "0", "expected greater than 0"),
        ("top_p", "1.01", "expected less than or equal to 1"),
        ("top_k", "-1", "expected greater than or equal to 0"),
        ("top_k", "2.5", "generate.top_k: found"),
        ("min_p", "1.5", "expected less than or equal to 1"),
        ("max_new_tokens", "0", "expected greater than or equal to 1"),
        ("responses", "0", "expected greater than or equal to 1"),
        ("prompt_tokens", "0", "expected greater than or equal to 1"),
        ("shard_prompts", "0", "expected greater than or equal to 1"),
    ],
)
def test_a_bad_value(field: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _run(f"--generate.{field}", value)
    assert f"generate.{field}: found" in str(caught.value)
    assert words in str(caught.value)


def test_bad_values_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        _run(
            "--generate.temperature", "-1", "--generate.top_p", "0", "--generate.responses", "0",
            "--generate.topk", "3",
        )  # fmt: skip
    assert str(caught.value).startswith("4 mistakes in the configuration:")
    assert "--generate.topk: unknown flag; did you mean --generate.top_k?" in str(caught.value)


def test_greedy_with_several_responses() -> None:
    with pytest.raises(ConfigError, match="found 3 at temperature 0, expected 1: all would be"):
        _run("--generate.temperature", "0", "--generate.responses", "3")


def test_it_has_to_fit_the_corpus() -> None:
    with pytest.raises(ConfigError) as caught:
        _run("--generate.enabled", "--max_length", "100", "--corpus.overlong", "split")
    message = str(caught.value)
    assert "corpus.overlong: found split, expected truncate or drop" in message
    assert "generate.max_new_tokens: found 512 and 32 prompt_tokens" in message
    assert "at most corpus.max_length (100)" in message
    fitting = GenerateSettings(enabled=True, max_new_tokens=68, prompt_tokens=32)
    assert mistakes_with_corpus(fitting, 100, "truncate") == []
    assert mistakes_with_corpus(fitting, 99, "truncate")


def test_everything_that_decides_tokens_is_in_the_identity() -> None:
    base = GenerateSettings(enabled=True)
    others: dict[str, Any] = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_new_tokens": 7,
        "responses": 2, "prompt_tokens": 8, "shard_prompts": 9, "record_logprobs": True,
        "record_top_k": 2,
    }  # fmt: skip
    others |= {"prompts": "heldout", "seed": 1}
    # Of a writer, its files are named beside these.
    elsewhere = {"enabled", "writer", "writer_revision", "writer_parallel_size"}
    assert set(others) | elsewhere == set(GenerateSettings.model_fields)
    for name, value in others.items():
        assert base.model_copy(update={name: value}).identity() != base.identity()
