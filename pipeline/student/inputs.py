"""What stage two needs before anything is loaded: its settings, the cache, the student's source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.cache.io.reader import Cache
from pipeline.data.filter import FilterCounts
from pipeline.data.mixture.caches import filtered_training_rows, open_caches, tags_of
from pipeline.data.mixture.settings import CacheShare, cache_text
from pipeline.data.order.totals import check_lengths, split_totals
from pipeline.data.settings import DataSettings
from pipeline.data.source import RowSource
from pipeline.errors import CacheError, Mistakes
from pipeline.loss.settings import LossSettings
from pipeline.models.device import uses_gpu
from pipeline.models.resolve import (
    most_positions,
    read_model_config,
    resolve_model,
    with_weights,
)
from pipeline.models.resolved import ResolvedModel
from pipeline.observe.devices import ForecastSettings
from pipeline.observe.settings import ObserveSettings
from pipeline.observe.trackers import check_trackers
from pipeline.student.build.check import check_student
from pipeline.student.build.freeze import read_unfrozen_parameters
from pipeline.student.build.initial import initial_identity
from pipeline.student.build.vocabulary import StudentVocabulary, open_vocabulary
from pipeline.student.compatibility import check_caches
from pipeline.student.output.hub import require_hub_token
from pipeline.student.settings.student import OutputSettings, StudentSettings
from pipeline.student.settings.train import TrainSettings
from pipeline.student.training.checkpoint import RunIdentity, stage_to_go_on_with

__all__ = ["Inputs", "RunSettings", "missing_here", "open_inputs"]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The settings of stage two, and what is known before anything is loaded."""

    student: StudentSettings
    loss: LossSettings
    data: DataSettings
    train: TrainSettings
    output: OutputSettings
    observe: ObserveSettings
    seed: int
    cache_url: str
    cache: Cache
    source: ResolvedModel
    vocabulary: StudentVocabulary
    filtered: Mapping[str, FilterCounts] = field(default_factory=dict)
    """What `data.filter` keeps of the training rows, by tag (a single cache has an empty one)."""

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.output.output_dir)

    @property
    def training_loss(self) -> LossSettings:
        """The loss as it is trained: cross-entropy alone has no temperature.

        Its KL is logged at temperature 1, which every cache holds.
        """
        if self.loss.alpha == 0:
            return self.loss.model_copy(update={"temperature": 1.0})
        return self.loss

    @property
    def sampled(self) -> bool:
        """Whether the cache holds sampled entries, whose sums are unbiased; else it is a top-k."""
        return self.cache.rule is not None

    @property
    def heldout_sampled(self) -> bool:
        """The same of the held-out rows: whether their KL is unbiased; else it is a bound."""
        return self.cache.heldout_rule is not None

    @property
    def tags(self) -> tuple[str, ...]:
        """Of the caches of a mixture; none of a single cache."""
        return tags_of(self.cache)

    def pack_length(self) -> int:
        """Tokens of the longest sequence there can be, in the student's tokens."""
        return self.vocabulary.pack_length()

    def longest_row(self) -> int:
        """Tokens of the longest row that a micro-batch may be, about."""
        if self.data.batch_tokens is not None:
            return self.data.batch_tokens
        packs = self.train.per_device_train_batch_size
        return packs * (self.data.pack_length or self.pack_length())

    def identity(self, world_size: int) -> RunIdentity:
        """Return everything that decides the losses of the run."""
        train = self._train_identity(world_size)
        # How the global batch is divided among ranks and passes does not change it.
        if self.data.batch_tokens is None:
            train["packs_per_step"] = self.packs_per_step(world_size)
        loss = self.loss.model_dump(mode="json")
        del loss["chunk_rows"], loss["compile_entries"]
        if loss["importance_clip"] is None:
            del loss["importance_clip"]
        if loss["weight"] == "uniform":
            del loss["weight"], loss["weight_temperature"], loss["weight_quantile"]
        if loss["cross_tokenizer"] == "reject":
            del loss["cross_tokenizer"]  # it rejects and changes nothing
        digest = self.vocabulary.digest
        lora = self.student.lora
        adapters = {"lora": lora.model_dump(mode="json", exclude={"save_adapter"})}
        router = [self.student.router_aux_loss, self.student.router_aux_coefficient]
        return RunIdentity(
            {
                "cache": self.cache.manifest.identity_digest,
                "corpus": self.cache.manifest.corpus_content,
                **({"vocabulary": digest} if digest is not None else {}),
                "student": initial_identity(self.student, self.source),
                "freeze": [list(self.student.freeze), _spectrum(self.student)],
                "loss": loss,
                "data": self.data.identity(),
                "train": train,
                "seed": self.seed,
                **(adapters if lora.enabled else {}),
                **({"router": router} if router[0] != "none" else {}),
            }
        )

    def stage(self, world_size: int) -> int:
        """Return the ZeRO stage of the run with so many processes."""
        return self.train.stage(dtype=self.dtype, world_size=world_size)

    @property
    def dtype(self) -> str:
        """Of weights and activations here: `float32`, `bfloat16` or `float16`."""
        return self.train.dtype(on_gpu=uses_gpu())

    def _train_identity(self, world_size: int) -> dict[str, Any]:
        train = self.train.model_dump(mode="json")
        for name in (
            "save_steps", "keep_checkpoints", "logging_steps", "profile_steps", "eval_steps",
            "evaluate", "evaluate_before", "resume_from_checkpoint", "timeout_s", "cpu_threads",
            "per_device_train_batch_size", "gradient_accumulation_steps",
            "offload_folder", "overlap_comm", "reduce_bucket_mb", "gather_bucket_mb",
            "prefetch_bucket_mb", "hpz_partition_size",
            "sequence_parallel_size", "tiled_mlp", "offload_activations",
        ):  # fmt: skip
            del train[name]
        train["zero_stage"] = self.stage(world_size)
        if train["accumulate_float32"]:
            del train["accumulate_float32"]
        for name in (
            "offload_parameters", "quantized_weights", "quantized_gradients", "learning_rates",
            "ema_decay",
        ):  # fmt: skip
            if not train[name]:
                del train[name]
        return train

    def packs_per_step(self, world_size: int) -> int:
        """Packed sequences of one optimiser step, over all ranks.

        Raises:
            ConfigError: the ranks are no multiple of `train.sequence_parallel_size`.
        """
        train = self.train
        groups = train.data_parallel_size(world_size)
        return train.per_device_train_batch_size * train.gradient_accumulation_steps * groups

    def pass_tokens(self, world_size: int) -> int:
        """Most tokens of one forward pass of one rank: its slice, where ranks share a pass."""
        train, data = self.train, self.data
        tokens = train.per_device_train_batch_size * (data.pack_length or self.pack_length())
        if data.batch_tokens is not None:
            parts = train.data_parallel_size(world_size) * train.gradient_accumulation_steps
            tokens = data.batch_tokens // parts + self.vocabulary.totals.longest
        return -(-tokens // train.sequence_parallel_size)


class RunSettings(Protocol):
    """The settings of a command of stage two, read only; such as `StudentRun`."""

    @property
    def cache_dir(self) -> str | tuple[CacheShare, ...]:
        """The cache's folder or address, or a mixture of caches."""

    @property
    def seed(self) -> int:
        """Of the order of the samples."""

    @property
    def student(self) -> StudentSettings:
        """Where the student comes from."""

    @property
    def loss(self) -> LossSettings:
        """What is minimised."""

    @property
    def data(self) -> DataSettings:
        """How rows become batches."""

    @property
    def train(self) -> TrainSettings:
        """How it is optimised."""

    @property
    def output(self) -> OutputSettings:
        """Where the student goes."""

    @property
    def observe(self) -> ObserveSettings:
        """Logs and trackers."""

    @property
    def forecast(self) -> ForecastSettings:
        """Hardware that the plan is made for; none: this machine."""


def open_inputs(run: RunSettings) -> Inputs:
    """Open the cache and resolve the student; reject what does not go together.

    Loads no weights: the student is looked at by its config, the names and shapes of its weights
    and its tokenizer, the cache by its manifest and the lengths of its rows.

    Raises:
        CacheError: no complete cache there, nothing held out though the run evaluates, or more
            entries asked for than held.
        ConfigError: a loss that the cache's targets cannot serve, rows longer than a pack or the
            student's positions, or settings that the student cannot serve. Several mistakes of
            whatever kind are one of these.
        ModelError: the student cannot be reached, is not complete, or has another tokenizer.
    """
    student, loss, data = run.student, run.loss, run.data
    mistakes, missing = Mistakes(), missing_here(run)
    cache = None
    with mistakes.collected():
        cache = open_caches(run.cache_dir, teachers=data.teachers)
    if cache is None:
        with mistakes.collected():
            resolve_model(student.model, revision=student.revision, role="student", weights=False)
        mistakes.join(missing)
        mistakes.raise_any()
    assert cache is not None
    with mistakes.collected():
        check_caches(loss, data, cache)
    with mistakes.collected():
        _check_heldout(cache, run)
    filtered: dict[str, FilterCounts] = {}
    rows: RowSource | None = None
    source = vocabulary = None
    with mistakes.collected():
        rows = cache.source("train", top_k=data.max_entries, tau_factor=data.tau_factor)
        if data.filter is not None:
            rows, filtered = filtered_training_rows(rows, cache, data.filter)
    with mistakes.collected():
        source = resolve_model(
            student.model, revision=student.revision, role="student", weights=False
        )
    if source is not None:
        with mistakes.collected():
            vocabulary = open_vocabulary(
                source.path, cache, cross_tokenizer=loss.cross_tokenizer, train=rows
            )
        if vocabulary is not None:
            with mistakes.collected():
                _check_lengths(vocabulary, source, run)
    elsewhere = run.forecast.device is not None
    if mistakes.are_there or (source is not None and not source.is_local):
        mistakes.join(missing)  # else with what else the preflight finds
    # A run that is refused downloads no weights, nor does a forecast.
    if source is not None and (source.is_local or not (mistakes.are_there or elsewhere)):
        with mistakes.collected():
            source = with_weights(source, "student")
            check_student(
                source.path,
                student,
                run.train,
                loss,
                vocabulary_size=None if vocabulary is None else vocabulary.size,
                on_gpu=elsewhere or uses_gpu(),
                elsewhere=elsewhere,
            )
    mistakes.raise_any()
    assert source is not None
    assert vocabulary is not None
    return Inputs(
        student=student,
        loss=loss,
        data=data,
        train=_train_as_before(run),
        output=run.output,
        observe=run.observe,
        seed=run.seed,
        cache_url=cache_text(run.cache_dir),
        cache=cache,
        source=source,
        vocabulary=vocabulary,
        filtered=filtered,
    )


def _train_as_before(run: RunSettings) -> TrainSettings:
    """Return the training's settings, with the ZeRO stage of the run that goes on."""
    if run.train.zero_stage is not None:
        return run.train
    stage = stage_to_go_on_with(Path(run.output.output_dir), run.train)
    return run.train.model_copy(update={"zero_stage": stage})


def missing_here(run: RunSettings | Inputs) -> Mistakes:
    """Collect what the run asks for and this machine has not: trackers' packages, a token."""
    missing = Mistakes()
    with missing.collected():
        check_trackers(run.observe.report_to)
    if run.output.push:
        with missing.collected():
            require_hub_token()
    return missing


def _check_heldout(cache: Cache, run: RunSettings) -> None:
    if run.train.evaluates and not any(cache.source("heldout").shard_rows()):
        raise CacheError(
            f"{cache_text(run.cache_dir)}: no held-out rows",
            expected="some, for the evaluation",
            do="make the cache with a larger --corpus.heldout_fraction, or train without an "
            "evaluation: --train.evaluate_before false --train.evaluate never",
        )


def _check_lengths(vocabulary: StudentVocabulary, source: ResolvedModel, run: RunSettings) -> None:
    mistakes = Mistakes()
    data = run.data
    totals = vocabulary.totals
    with mistakes.collected():
        check_lengths(totals, data.pack_length or vocabulary.pack_length(), data.batch_tokens)
    positions = most_positions(read_model_config(source.path))
    for split, longest in (
        ("training", totals.longest),
        ("held-out", split_totals(vocabulary.heldout).longest if run.train.evaluates else 0),
    ):
        if positions is not None and longest > positions:
            mistakes.add(
                f"student.model: found {positions} positions (max_position_embeddings), but the "
                f"cache has a {split} row of {longest} tokens; expected at least as many; choose a "
                "student with more, or make the cache with a smaller --corpus.max_length"
            )
    mistakes.raise_any()


def _spectrum(student: StudentSettings) -> list[str]:
    return (
        read_unfrozen_parameters(student.layers_to_unfreeze) if student.layers_to_unfreeze else []
    )
