"""Everything that is known before the teacher is loaded: the teacher, the corpus, the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.cache.codec.spec import MAX_VOCAB_SIZE
from pipeline.corpus.intake import TeacherTokens
from pipeline.corpus.prompts import PromptIntake, PromptLimits
from pipeline.corpus.settings import CorpusSettings
from pipeline.errors import ConfigError
from pipeline.models.resolve import read_model_config, resolve_model
from pipeline.models.resolved import ResolvedModel
from pipeline.models.tokenizer import end_tokens, load_tokenizer
from pipeline.teacher.capture.source import PreparedShards
from pipeline.teacher.capture.task import CaptureTask, capture_task
from pipeline.teacher.engines.base import Teacher
from pipeline.teacher.engines.registry import engine_info
from pipeline.teacher.generation.plan import UpperBound, WritingTask, plan_responses
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.generation.shards import PromptShards
from pipeline.teacher.preparation.corpus import CorpusWork, corpus_work
from pipeline.teacher.settings import CaptureSettings, TeacherSettings

__all__ = ["Prepared", "check_fits", "corpus_source", "open_corpus", "prepare"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is to be done."""

    capture: CaptureTask
    """Where responses are still to be written, its shards are not known and its sums are upper
    bounds."""
    corpus: CorpusWork
    """What prepares the samples, or the prompts."""
    writing: WritingTask | None = None
    """Where the teacher writes the responses."""


def prepare(
    teacher: TeacherSettings,
    corpus: CorpusSettings,
    capture: CaptureSettings,
    *,
    seed: int,
    cache_url: str,
    generate: GenerateSettings | None = None,
) -> Prepared:
    """Resolve the teacher and open the corpus; no teacher is loaded, no row prepared.

    Raises:
        ConfigError, ModelError, CorpusError: as the parts say.
    """
    resolved = _resolve(teacher, corpus, capture)
    tokens = _tokens(resolved)
    work = corpus_work(
        corpus,
        tokenizer=resolved.tokenizer,
        seed=seed,
        teacher=tokens,
        cache_url=cache_url,
        prompts=_prompt_limits(corpus, generate),
    )
    generate = generate or GenerateSettings()
    prompts = corpus_source(work, capture, generate)
    if isinstance(prompts, PreparedShards):
        return Prepared(capture_task(resolved, capture, work.intake.identity(), prompts), work)
    assert isinstance(work.intake, PromptIntake)
    plan = plan_responses(
        generate, tokenizer=resolved.tokenizer, seed=seed, teacher=tokens, intake=work.intake
    )
    task = capture_task(resolved, capture, plan.identity(), UpperBound(plan, prompts))
    return Prepared(task, work, WritingTask(resolved, plan, prompts, capture, task.identity))


def open_corpus(
    teacher: TeacherSettings,
    corpus: CorpusSettings,
    *,
    seed: int,
    cache_url: str,
    generate: GenerateSettings | None = None,
) -> CorpusWork:
    """Open the corpus alone, with no more of the teacher than its tokenizer.

    Raises:
        ConfigError, ModelError, CorpusError: as the parts say.
    """
    model = resolve_model(teacher.model, revision=teacher.revision, role="teacher")
    config = _text_config(model)
    check_fits(config, corpus, None)
    tokenizer = load_tokenizer(model.path)
    tokens = TeacherTokens(end_tokens(model.path, tokenizer), int(config["vocab_size"]))
    return corpus_work(
        corpus,
        tokenizer=tokenizer,
        seed=seed,
        teacher=tokens,
        cache_url=cache_url,
        prompts=_prompt_limits(corpus, generate),
    )


def corpus_source(
    work: CorpusWork, capture: CaptureSettings, generate: GenerateSettings
) -> PreparedShards | PromptShards:
    """Return what a corpus is prepared for: shards of samples, or of prompts."""
    if isinstance(work.intake, PromptIntake):
        return PromptShards(lambda: work.view, work.intake, generate.shard_prompts)
    return PreparedShards.of_rows(lambda: work.view, work.intake, capture.shard_tokens)


def _resolve(teacher: TeacherSettings, corpus: CorpusSettings, capture: CaptureSettings) -> Teacher:
    info = engine_info(teacher)
    model = resolve_model(teacher.model, revision=teacher.revision, role="teacher")
    config = _text_config(model)
    check_fits(config, corpus, capture)
    tokenizer = load_tokenizer(model.path)
    return Teacher(teacher, model, info, tokenizer, int(config["vocab_size"]), corpus.max_length)


def _prompt_limits(
    corpus: CorpusSettings, generate: GenerateSettings | None
) -> PromptLimits | None:
    """Return the lengths of prompts, where the teacher answers them."""
    if generate is None or not generate.enabled:
        return None
    return PromptLimits(generate.prompt_tokens, corpus.max_length - generate.max_new_tokens)


def _text_config(model: ResolvedModel) -> dict[str, Any]:
    config = read_model_config(model.path)
    found: dict[str, Any] = config.get("text_config", config)
    return found


def _tokens(teacher: Teacher) -> TeacherTokens:
    ends = end_tokens(teacher.model.path, teacher.tokenizer)
    return TeacherTokens(ends, teacher.vocab_size)


def check_fits(
    config: dict[str, Any], corpus: CorpusSettings, capture: CaptureSettings | None
) -> None:
    """Reject settings that a teacher's config cannot serve.

    Args:
        config: of its text part.
        corpus: its longest sequence.
        capture: entries of a position; None where nothing is captured.

    Raises:
        ConfigError: with all mistakes.
    """
    mistakes, vocab_size = [], int(config["vocab_size"])
    if vocab_size > MAX_VOCAB_SIZE:
        mistakes.append(
            f"teacher.model: found a vocabulary of {vocab_size} tokens, expected at most "
            f"{MAX_VOCAB_SIZE} (2^19 - 1), which is what a cache can hold"
        )
    if capture is not None and capture.scheme != "threshold" and capture.top_k >= vocab_size:
        mistakes.append(
            f"capture.top_k: found {capture.top_k}, expected less than the teacher's "
            f"vocabulary of {vocab_size}"
        )
    positions = config.get("max_position_embeddings")
    if positions and corpus.max_length > int(positions):
        mistakes.append(
            f"corpus.max_length: found {corpus.max_length}, expected at most the teacher's "
            f"{positions} positions"
        )
    if mistakes:
        raise ConfigError(mistakes=mistakes)
