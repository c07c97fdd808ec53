"""Everything that is known before the teacher is loaded: the teacher, the corpus, the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.cache.codec.spec import MAX_VOCAB_SIZE
from pipeline.corpus.intake import TeacherTokens
from pipeline.corpus.settings import CorpusSettings
from pipeline.errors import ConfigError
from pipeline.models.resolve import read_model_config, resolve_model
from pipeline.models.resolved import ResolvedModel
from pipeline.models.tokenizer import end_tokens, load_tokenizer
from pipeline.teacher.capture.source import PreparedShards, TableShards
from pipeline.teacher.capture.task import CaptureTask, capture_task
from pipeline.teacher.engines.base import Teacher
from pipeline.teacher.engines.registry import engine_info
from pipeline.teacher.generation.plan import WritingTask, plan_responses
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.preparation.corpus import CorpusWork, corpus_work
from pipeline.teacher.settings import CaptureSettings, TeacherSettings

__all__ = ["Prepared", "open_corpus", "prepare"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is to be done."""

    capture: CaptureTask
    """Where responses are still to be written, its shards are upper bounds, and its identity lacks
    what only the responses decide."""
    corpus: CorpusWork | None = None
    """Where the samples are the corpus's own: what prepares them."""
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

    Where the teacher writes the responses, its prompts are prepared here.

    Raises:
        ConfigError, ModelError, CorpusError: as the parts say.
    """
    resolved = _resolve(teacher, corpus, capture)
    if generate is None or not generate.enabled:
        work = corpus_work(
            corpus,
            tokenizer=resolved.tokenizer,
            seed=seed,
            teacher=_tokens(resolved),
            cache_url=cache_url,
        )
        source = PreparedShards(lambda: work.view, work.intake, capture.shard_tokens)
        return Prepared(capture_task(resolved, capture, work.intake.identity(), source), work)
    responses = plan_responses(
        corpus,
        generate,
        tokenizer=resolved.tokenizer,
        seed=seed,
        teacher=_tokens(resolved),
    )
    bound = responses.upper_bound()
    source_of_bound = TableShards(bound, capture.shard_tokens)
    task = capture_task(resolved, capture, bound.identity, source_of_bound)
    return Prepared(task, writing=WritingTask(resolved, responses, capture, task.identity))


def open_corpus(
    teacher: TeacherSettings, corpus: CorpusSettings, *, seed: int, cache_url: str
) -> CorpusWork:
    """Open the corpus alone, with no more of the teacher than its tokenizer.

    Raises:
        ConfigError, ModelError, CorpusError: as the parts say.
    """
    model = resolve_model(teacher.model, revision=teacher.revision, role="teacher")
    config = _text_config(model)
    _check_fits(config, corpus, None)
    tokenizer = load_tokenizer(model.path)
    tokens = TeacherTokens(end_tokens(model.path, tokenizer), int(config["vocab_size"]))
    return corpus_work(corpus, tokenizer=tokenizer, seed=seed, teacher=tokens, cache_url=cache_url)


def _resolve(teacher: TeacherSettings, corpus: CorpusSettings, capture: CaptureSettings) -> Teacher:
    info = engine_info(teacher)
    model = resolve_model(teacher.model, revision=teacher.revision, role="teacher")
    config = _text_config(model)
    _check_fits(config, corpus, capture)
    tokenizer = load_tokenizer(model.path)
    return Teacher(teacher, model, info, tokenizer, int(config["vocab_size"]), corpus.max_length)


def _text_config(model: ResolvedModel) -> dict[str, Any]:
    config = read_model_config(model.path)
    found: dict[str, Any] = config.get("text_config", config)
    return found


def _tokens(teacher: Teacher) -> TeacherTokens:
    ends = end_tokens(teacher.model.path, teacher.tokenizer)
    return TeacherTokens(ends, teacher.vocab_size)


def _check_fits(
    config: dict[str, Any], corpus: CorpusSettings, capture: CaptureSettings | None
) -> None:
    mistakes, vocab_size = [], int(config["vocab_size"])
    if vocab_size > MAX_VOCAB_SIZE:
        mistakes.append(
            f"teacher.model: found a vocabulary of {vocab_size} tokens, expected at most "
            f"{MAX_VOCAB_SIZE} (2^18), which is what a cache can hold"
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
