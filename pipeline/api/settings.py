"""The settings of the two stages; imports nothing heavy, so `--help` stays quick.

In one module, so that each stage can say of a flag that it belongs to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from pydantic import model_validator

from pipeline.config import Settings, option, rule
from pipeline.corpus.settings import CorpusSettings
from pipeline.data.mixture.settings import CacheDir
from pipeline.data.settings import DataSettings
from pipeline.loss.settings import LossSettings
from pipeline.observe.devices import ForecastSettings
from pipeline.observe.settings import ObserveSettings, WorkerObserveSettings
from pipeline.student.settings.student import OutputSettings, StudentSettings
from pipeline.student.settings.train import TrainSettings
from pipeline.teacher.generation.settings import GenerateSettings, mistakes_with_corpus
from pipeline.teacher.settings import CaptureSettings, TeacherSettings, mistakes_with_length

__all__ = ["StudentRun", "TeacherRun"]


class TeacherRun(Settings):
    """All settings of stage one."""

    cache_dir: str = option(
        "runs/default/cache",
        "where the cache goes: a folder, or any address fsspec opens (s3://bucket/cache)",
    )
    seed: int = option(42, "of the held-out split and whatever else is sampled", ge=0)
    teacher: TeacherSettings = TeacherSettings()
    corpus: CorpusSettings = CorpusSettings()
    generate: GenerateSettings = GenerateSettings()
    capture: CaptureSettings = CaptureSettings()
    observe: WorkerObserveSettings = WorkerObserveSettings()

    @model_validator(mode="after")
    def _shards_hold_a_sample(self) -> Self:
        # Where max_length is the teacher's, its number is known when the teacher is.
        longest = self.corpus.max_length
        mistakes = [] if longest is None else mistakes_with_length(self.capture, longest)
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    @model_validator(mode="after")
    def _responses_fit_the_corpus(self) -> Self:
        corpus = self.corpus
        mistakes = mistakes_with_corpus(self.generate, corpus.max_length, corpus.overlong)
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    @property
    def worker_gpus(self) -> int:
        """GPUs that a worker needs where models run on GPUs: the teacher's, or the writer's."""
        devices = self.teacher.devices if self.teacher.engine == "vllm" else 1
        if self.generate.enabled and self.generate.writer is not None:
            return max(devices, self.generate.writer_parallel_size)
        return devices

    @rule
    def _writing_is_asked_for(self) -> Iterator[str]:
        # A file for several runs may say `enabled: false`; not to say it is most likely forgotten.
        generate = self.generate
        if "enabled" in generate.model_fields_set:
            return
        for name, value, usual in (
            ("writer", generate.writer, None),
            ("prompts", generate.prompts, "all"),
            ("record_logprobs", generate.record_logprobs, False),
            ("record_top_k", generate.record_top_k, 0),
        ):
            if value != usual:
                yield (
                    f"generate.{name}: found {value} without generate.enabled, expected "
                    "--generate.enabled true beside it, or none"
                )

    @model_validator(mode="after")
    def _writer_can_be_shared(self) -> Self:
        teacher, shared = self.teacher, self.generate.writer_parallel_size
        behind = teacher.engine == "openai"
        engine = teacher.endpoint.writer_engine if behind else teacher.engine
        if shared > 1 and engine != "vllm":
            raise ValueError(
                f"generate.writer_parallel_size: found {shared} with a writer on {engine}, "
                "expected 1: only vLLM divides a model among GPUs"
            )
        return self

    @model_validator(mode="after")
    def _endpoint_can_serve(self) -> Self:
        capture, mistakes = self.capture, []
        if self.teacher.engine != "openai":
            return self
        if capture.scheme != "top_k":
            mistakes.append(
                f"capture.scheme: found {capture.scheme} with teacher.engine openai, expected "
                "top_k: servers tell the largest entries alone"
            )
        if capture.heldout == "sampled":
            mistakes.append(
                "capture.heldout: found sampled with teacher.engine openai, expected auto or same: "
                "servers tell the largest entries alone"
            )
        if capture.temperatures != (1.0,):
            mistakes.append(
                f"capture.temperatures: found {list(capture.temperatures)} with teacher.engine "
                "openai, expected [1.0]: servers know no other normaliser"
            )
        if self.generate.enabled and self.generate.writer is None:
            mistakes.append(
                "generate.enabled: found it with teacher.engine openai, expected generate.writer "
                "beside it: a teacher behind an endpoint scores what another model writes"
            )
        if self.generate.enabled and self.generate.record_top_k:
            mistakes.append(
                f"generate.record_top_k: found {self.generate.record_top_k} with teacher.engine "
                "openai, expected 0: servers tell their own largest entries, not ids asked for"
            )
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    @model_validator(mode="after")
    def _capture_fits_the_path(self) -> Self:
        through_api = self.teacher.capture_path == "prompt_logprobs"
        if through_api and self.teacher.engine == "vllm" and self.capture.scheme != "top_k":
            raise ValueError(
                f"capture.scheme: found {self.capture.scheme} through prompt_logprobs, expected "
                "top_k: vLLM's log-probs are those of the largest entries alone; use "
                "--teacher.capture_path device to draw"
            )
        if through_api and self.teacher.engine == "vllm" and self.capture.heldout == "sampled":
            raise ValueError(
                "capture.heldout: found sampled through prompt_logprobs, expected auto or same: "
                "vLLM's log-probs are those of the largest entries alone"
            )
        if through_api and self.teacher.engine == "vllm" and self.capture.temperatures != (1.0,):
            raise ValueError(
                f"capture.temperatures: found {list(self.capture.temperatures)} through "
                "prompt_logprobs, expected [1.0]: vLLM's log-probs know no other normaliser; use "
                "--teacher.capture_path device for more"
            )
        return self


class StudentRun(Settings):
    """All settings of stage two."""

    cache_dir: CacheDir = option(
        "runs/default/cache",
        "the cache: a folder, or any address fsspec opens (s3://bucket/cache); or a mixture, a "
        "list of {url, weight, tag} in a file, or several addresses of equal weight",
    )
    seed: int = option(42, "of the order of the samples", ge=0)
    student: StudentSettings = StudentSettings()
    loss: LossSettings = LossSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    output: OutputSettings = OutputSettings()
    observe: ObserveSettings = ObserveSettings()
    forecast: ForecastSettings = ForecastSettings()

    @model_validator(mode="after")
    def _one_batch_size(self) -> Self:
        if self.data.batch_tokens is not None and self.train.per_device_train_batch_size != 1:
            raise ValueError(
                f"train.per_device_train_batch_size: found "
                f"{self.train.per_device_train_batch_size} with data.batch_tokens, which counts "
                "tokens instead; expected 1"
            )
        return self
