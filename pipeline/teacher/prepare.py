"""Everything that is known before the teacher is loaded: the teacher, the corpus, the plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.codec.spec import MAX_VOCAB_SIZE
from pipeline.corpus.chat.rendering.template import load_template
from pipeline.corpus.intake import TeacherTokens
from pipeline.corpus.prompts import PromptIntake, PromptLimits
from pipeline.corpus.reading import open_reading
from pipeline.corpus.settings import LONGEST, CorpusSettings
from pipeline.errors import ConfigError, Mistakes, ModelError
from pipeline.models.resolve import (
    most_positions,
    read_model_config,
    resolve_model,
    text_config,
    with_weights,
)
from pipeline.models.resolved import ResolvedModel
from pipeline.models.tokenizer import end_tokens, load_tokenizer
from pipeline.storage import Store
from pipeline.storage.local import require_writable
from pipeline.teacher.capture.source import PreparedShards
from pipeline.teacher.capture.task import CaptureTask, capture_task
from pipeline.teacher.engines.base import EngineInfo, Teacher
from pipeline.teacher.engines.registry import check_engine, engine_info, with_head
from pipeline.teacher.generation.plan import UpperBound, WritingTask, plan_responses
from pipeline.teacher.generation.settings import GenerateSettings, mistakes_with_corpus
from pipeline.teacher.generation.shards import PromptShards
from pipeline.teacher.preparation.corpus import CorpusWork, corpus_work
from pipeline.teacher.settings import CaptureSettings, TeacherSettings, mistakes_with_length
from pipeline.teacher.writer import Writer, resolve_writer, teacher_as_writer

__all__ = ["Prepared", "check_fits", "corpus_source", "open_corpus", "prepare"]

_log = logging.getLogger(__name__)


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
        DistillError: as the parts say; several mistakes of whatever kind are one error.
    """
    generate = generate or GenerateSettings()
    opened = _open(
        teacher, corpus, seed=seed, cache_url=cache_url, generate=generate, capture=capture
    )
    work, info = opened.work, opened.info
    assert info is not None
    on_gpu = info.device == "cuda"
    teacher, capture = teacher.for_device(on_gpu=on_gpu), capture.for_device(on_gpu=on_gpu)
    # Servers have the weights already.
    served = teacher.engine == "openai"
    model = opened.model if served else with_weights(opened.model, "teacher")
    info = with_head(info, teacher, read_model_config(model.path))
    resolved = Teacher(
        teacher, model, info, opened.tokenizer, opened.vocab_size, work.settings.longest
    )
    prompts = corpus_source(work, capture, generate)
    if isinstance(prompts, PreparedShards):
        return Prepared(capture_task(resolved, capture, work.intake.identity(), prompts), work)
    assert isinstance(work.intake, PromptIntake)
    writer = opened.writer or teacher_as_writer(resolved)
    plan = plan_responses(
        generate,
        tokenizer=resolved.tokenizer,
        seed=seed,
        teacher=work.intake.teacher,
        writer=writer,
        intake=work.intake,
    )
    task = capture_task(
        resolved,
        capture,
        plan.identity(),
        UpperBound(plan, prompts),
        written_logprobs=generate.record_logprobs,
        requested_entries=generate.record_top_k > 0,
    )
    return Prepared(
        task, work, WritingTask(resolved, writer, plan, prompts, capture, task.identity)
    )


def open_corpus(
    teacher: TeacherSettings,
    corpus: CorpusSettings,
    *,
    seed: int,
    cache_url: str,
    generate: GenerateSettings | None = None,
    few: bool = False,
) -> CorpusWork:
    """Open the corpus alone, with no more of the teacher than its tokenizer and config.

    Args:
        teacher: the teacher; its weights are not fetched.
        corpus: the data set.
        seed: of the held-out split.
        cache_url: where the corpus is prepared, unless it has an address of its own.
        generate: whether the teacher answers.
        few: only the first rows are wanted, and nothing is written.

    Raises:
        DistillError: as the parts say; several mistakes of whatever kind are one error.
    """
    generate = generate or GenerateSettings()
    return _open(teacher, corpus, seed=seed, cache_url=cache_url, generate=generate, few=few).work


def corpus_source(
    work: CorpusWork, capture: CaptureSettings, generate: GenerateSettings
) -> PreparedShards | PromptShards:
    """Return what a corpus is prepared for: shards of samples, or of prompts."""
    if isinstance(work.intake, PromptIntake):
        return PromptShards(
            lambda: work.view,
            work.intake,
            generate.shard_prompts,
            only_heldout=generate.prompts == "heldout",
        )
    return PreparedShards.of_rows(lambda: work.view, work.intake, capture.shard_tokens)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A teacher and a corpus that go together, without the teacher's weights."""

    model: ResolvedModel
    tokenizer: Any
    vocab_size: int
    work: CorpusWork
    info: EngineInfo | None
    """None where no teacher is going to run."""
    writer: Writer | None
    """Who writes the responses, where it is not the teacher."""


def _open(
    teacher: TeacherSettings,
    corpus: CorpusSettings,
    *,
    seed: int,
    cache_url: str,
    generate: GenerateSettings,
    capture: CaptureSettings | None = None,
    few: bool = False,
) -> _Opened:
    """Open what a run names, the cheap before the dear; tell all that is wrong with it at once."""
    mistakes = Mistakes()
    if not few:
        for setting, place in (("cache_dir", cache_url), ("corpus.prepared", corpus.prepared)):
            with mistakes.collected():
                _check_place(place, setting)
    info = model = config = tokenizer = reading = work = writer = None
    if capture is not None:
        with mistakes.collected():
            info = engine_info(teacher)
    with mistakes.collected():
        _check_requested(teacher, generate)
    with mistakes.collected():
        model = resolve_model(
            teacher.model, revision=teacher.revision, role="teacher", weights=False
        )
        config = _text_config(model)
    if config is not None:
        with mistakes.collected():
            corpus = _with_length(corpus, config)
            check_fits(config, corpus, generate, capture)
    if capture is not None and info is not None:
        with mistakes.collected():
            check_engine(teacher, capture, corpus.max_length)
    if model is not None:
        with mistakes.collected():
            tokenizer = load_tokenizer(model.path)
    if tokenizer is not None and not few and generate.enabled and generate.writer is not None:
        with mistakes.collected():
            writer = resolve_writer(
                generate.writer,
                teacher,
                revision=generate.writer_revision,
                parallel_size=generate.writer_parallel_size,
                tokenizer=tokenizer,
                max_length=corpus.longest,
            )
    with mistakes.collected():
        # Of a run that cannot be, a hub dataset is not downloaded to say so.
        reading = open_reading(corpus, answered=not generate.enabled, few=few or mistakes.are_there)
    if tokenizer is not None and model is not None and config is not None:
        with mistakes.collected():
            if reading is None:
                if corpus.chat_template is not None:
                    load_template(tokenizer, corpus.chat_template, corpus.template_options)
            else:
                work = corpus_work(
                    corpus,
                    tokenizer=tokenizer,
                    seed=seed,
                    teacher=TeacherTokens(
                        end_tokens(model.path, tokenizer), int(config["vocab_size"])
                    ),
                    cache_url=cache_url,
                    prompts=_prompt_limits(corpus, generate),
                    reading=reading,
                )
    mistakes.raise_any()
    assert model is not None
    assert config is not None
    assert work is not None
    return _Opened(model, tokenizer, int(config["vocab_size"]), work, info, writer)


def _check_requested(teacher: TeacherSettings, generate: GenerateSettings) -> None:
    by_vllm = teacher.engine == "vllm" and teacher.capture_path == "prompt_logprobs"
    if generate.enabled and generate.record_top_k and by_vllm:
        raise ConfigError(
            f"generate.record_top_k {generate.record_top_k} with teacher.capture_path "
            "prompt_logprobs",
            expected="0: vLLM's prompt log-probs are the teacher's own top-k, not of ids asked for",
            do="use --teacher.capture_path device, or --generate.record_top_k 0",
        )


def _check_place(place: str | None, setting: str) -> None:
    if place is None:
        return
    store = Store(place)
    # One that is there may be complete, and on a disk that cannot be written.
    if store.is_local and not Path(store.root).is_dir():
        require_writable(Path(store.root), setting)


def _prompt_limits(corpus: CorpusSettings, generate: GenerateSettings) -> PromptLimits | None:
    """Return the lengths of prompts, where the teacher answers them."""
    if not generate.enabled:
        return None
    return PromptLimits(generate.prompt_tokens, corpus.longest - generate.max_new_tokens)


def _text_config(model: ResolvedModel) -> dict[str, Any]:
    found = dict(text_config(read_model_config(model.path)))
    if not isinstance(found.get("vocab_size"), int):
        raise ModelError(
            f"teacher {model.name!r}: its config.json names no vocab_size",
            expected="the number of rows of its head",
            do="add it to the config.json of a copy of the model",
        )
    return found


def _with_length(corpus: CorpusSettings, config: dict[str, Any]) -> CorpusSettings:
    """Return the settings with a number for `max_length`; log where it comes from."""
    if corpus.max_length is not None:
        return corpus
    positions = most_positions(config)
    found = corpus.for_positions(positions)
    if positions is not None and positions <= LONGEST:
        why = "all positions of the teacher"
    else:
        has = "any number of positions" if positions is None else f"{positions} positions"
        why = f"the teacher has {has}; --max_length takes more of a row, for more memory"
    _log.info("max_length is not set: %d tokens (%s)", found.longest, why)
    return found


def check_fits(
    config: dict[str, Any],
    corpus: CorpusSettings,
    generate: GenerateSettings,
    capture: CaptureSettings | None,
) -> None:
    """Reject settings that a teacher's config cannot serve.

    Args:
        config: of its text part.
        corpus: its longest sequence.
        generate: the room for a response, where the teacher writes.
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
    positions = most_positions(config)
    if positions is not None and corpus.longest > positions:
        mistakes.append(
            f"corpus.max_length: found {corpus.longest}, expected at most the teacher's "
            f"{positions} positions"
        )
    if capture is not None:
        mistakes += mistakes_with_length(capture, corpus.longest)
    mistakes += mistakes_with_corpus(generate, corpus.longest, corpus.overlong)
    if mistakes:
        raise ConfigError(mistakes=mistakes)
