"""Everything that is known before the teacher is loaded: the teacher, the corpus, the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.cache.codec.spec import MAX_VOCAB_SIZE
from pipeline.corpus.build import build_corpus
from pipeline.corpus.intake import TeacherTokens
from pipeline.corpus.settings import CorpusSettings
from pipeline.errors import ConfigError
from pipeline.models.resolve import read_model_config, resolve_model
from pipeline.models.tokenizer import end_tokens, load_tokenizer
from pipeline.teacher.capture.task import CaptureTask, capture_task
from pipeline.teacher.engines.base import Teacher
from pipeline.teacher.engines.registry import engine_info
from pipeline.teacher.generation.plan import WritingTask, plan_responses
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.settings import CaptureSettings, TeacherSettings

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is to be done."""

    capture: CaptureTask
    """Where responses are still to be written, its corpus and plan are upper bounds, and its
    identity lacks what only the responses decide."""
    writing: WritingTask | None = None
    """Where the teacher writes the responses."""


def prepare(
    teacher: TeacherSettings,
    corpus: CorpusSettings,
    capture: CaptureSettings,
    *,
    seed: int,
    generate: GenerateSettings | None = None,
) -> Prepared:
    """Resolve the teacher, tokenise the corpus and cut the plan; no teacher is loaded.

    Raises:
        ConfigError, ModelError, CorpusError: as the parts say.
    """
    resolved = _resolve(teacher, corpus, capture)
    if generate is None or not generate.enabled:
        built = build_corpus(
            corpus, tokenizer=resolved.tokenizer, seed=seed, teacher=_tokens(resolved)
        )
        return Prepared(capture_task(resolved, capture, built))
    responses = plan_responses(
        corpus,
        generate,
        tokenizer=resolved.tokenizer,
        seed=seed,
        teacher=_tokens(resolved),
    )
    task = capture_task(resolved, capture, responses.upper_bound())
    return Prepared(task, WritingTask(resolved, responses, capture, task.identity))


def _resolve(teacher: TeacherSettings, corpus: CorpusSettings, capture: CaptureSettings) -> Teacher:
    info = engine_info(teacher)
    model = resolve_model(teacher.model, revision=teacher.revision, role="teacher")
    config = read_model_config(model.path)
    config = config.get("text_config", config)
    vocab_size = int(config["vocab_size"])
    _check_fits(config, corpus, capture, vocab_size)
    tokenizer = load_tokenizer(model.path)
    return Teacher(teacher, model, info, tokenizer, vocab_size, corpus.max_length)


def _tokens(teacher: Teacher) -> TeacherTokens:
    ends = end_tokens(teacher.model.path, teacher.tokenizer)
    return TeacherTokens(ends, teacher.vocab_size)


def _check_fits(
    config: dict[str, Any], corpus: CorpusSettings, capture: CaptureSettings, vocab_size: int
) -> None:
    mistakes = []
    if vocab_size > MAX_VOCAB_SIZE:
        mistakes.append(
            f"teacher.model: found a vocabulary of {vocab_size} tokens, expected at most "
            f"{MAX_VOCAB_SIZE} (2^18), which is what a cache can hold"
        )
    if capture.scheme != "threshold" and capture.top_k >= vocab_size:
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
