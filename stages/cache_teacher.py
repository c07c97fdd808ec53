"""Stage one: run the teacher once over a corpus and write its sparse logits as a cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from pipeline.config import Settings, dump_yaml, option, parse_command
from pipeline.config.command import command_line
from pipeline.corpus.settings import CorpusSettings
from pipeline.errors import run_command
from pipeline.observe.settings import WorkerObserveSettings
from pipeline.teacher.generation.settings import GenerateSettings, mistakes_with_corpus
from pipeline.teacher.settings import CaptureSettings, TeacherSettings

__all__ = ["TeacherRun", "main"]

PROG = "python -m stages.cache_teacher"


class TeacherRun(Settings):
    """Everything stage one can be told."""

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
        if self.capture.shard_tokens < self.corpus.max_length:
            raise ValueError(
                f"capture.shard_tokens: found {self.capture.shard_tokens}, expected at least "
                f"corpus.max_length ({self.corpus.max_length})"
            )
        return self

    @model_validator(mode="after")
    def _responses_fit_the_corpus(self) -> Self:
        corpus = self.corpus
        mistakes = mistakes_with_corpus(self.generate, corpus.max_length, corpus.overlong)
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
        if through_api and self.teacher.engine == "vllm" and self.capture.temperatures != (1.0,):
            raise ValueError(
                f"capture.temperatures: found {list(self.capture.temperatures)} through "
                "prompt_logprobs, expected [1.0]: vLLM's log-probs know no other normaliser; use "
                "--teacher.capture_path device for more"
            )
        return self


def main(argv: Sequence[str] | None = None) -> int:
    """Run stage one; the same command again goes on where it stopped."""
    from stages.train_student import StudentRun

    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parse_command(
        TeacherRun,
        arguments,
        prog=PROG,
        description=__doc__ or "",
        switches={
            "dry_run": "print the plan (samples, tokens, shards, bytes, memory, time from a short "
            "calibration) and exit",
            "retry_quarantined": "try the quarantined rows again (give it to one worker)",
        },
        examples=[
            f"{PROG} --config stages/configs/teacher.yaml",
            f"{PROG} --teacher_model Qwen/Qwen2-7B-Instruct --dataset_name mlabonne/FineTome-100k "
            "--cache_dir s3://bucket/cache",
            f"{PROG} --config stages/configs/teacher-writes.yaml",
            f"{PROG} --config stages/configs/teacher.yaml --dry-run",
            f"{PROG} --config stages/configs/teacher.yaml --retry-quarantined",
        ],
        elsewhere={"stage two, train-student": StudentRun},
    )
    run = command.settings
    from pipeline.cache.layout.quarantine import describe_quarantine, read_quarantine
    from pipeline.observe.logs import configure_logging
    from pipeline.observe.prometheus import serve_metrics
    from pipeline.observe.shares import Shares, summary_line
    from pipeline.storage import Store
    from pipeline.teacher.capture.fit_tau import calibrated
    from pipeline.teacher.capture.run import cache_teacher, prepare
    from pipeline.teacher.estimate import check_resources, forecast, print_forecast
    from pipeline.teacher.fleet.leases import worker_name
    from pipeline.teacher.fleet.signals import interruptible
    from pipeline.teacher.generation.run import with_responses, write_responses

    configure_logging(run.observe.log_level)
    store = Store(run.cache_dir)
    shares = Shares()
    dry = "dry_run" in command.switches
    port = None if dry else run.observe.prometheus_port
    shard_tokens = run.capture.shard_tokens
    # Before anything else: a port that is taken is said at once, not after the tokenising.
    endpoint = serve_metrics(
        shares, port=port, host=run.observe.prometheus_host, worker=worker_name()
    )
    with interruptible(), endpoint:
        with shares.spent("preparing"):
            prepared = prepare(
                run.teacher, run.corpus, run.capture, seed=run.seed, generate=run.generate
            )
        if dry:
            prepared = with_responses(prepared, store=store, shard_tokens=shard_tokens)
            if prepared.responses is None:
                prepared = calibrated(
                    prepared, run.teacher, run.capture, store=store,
                    max_length=run.corpus.max_length, keep=False,
                )  # fmt: skip
            plan = forecast(prepared, run.teacher, run.capture)
            print_forecast(
                prepared, plan, run.teacher, run.capture, store, max_length=run.corpus.max_length
            )
            return 0
        check_resources(forecast(prepared, run.teacher, run.capture), store)
        prepared = write_responses(
            prepared,
            run.teacher,
            run.capture,
            store=store,
            max_length=run.corpus.max_length,
            progress_every_s=run.observe.progress_every_s,
        )
        prepared = calibrated(
            prepared, run.teacher, run.capture, store=store, max_length=run.corpus.max_length
        )
        if run.generate.enabled:
            check_resources(forecast(prepared, run.teacher, run.capture), store)
        manifest = cache_teacher(
            prepared,
            run.teacher,
            run.capture,
            store=store,
            max_length=run.corpus.max_length,
            command=command_line(PROG, arguments),
            # How a worker logs and is watched is not the cache's: each would write it otherwise.
            resolved_config=dump_yaml(run, without=("observe",)),
            progress_every_s=run.observe.progress_every_s,
            retry_quarantined="retry_quarantined" in command.switches,
            shares=shares,
        )
        failures = read_quarantine(store)
    summary = shares.summary()
    if summary.counts:
        print(f"this worker: {summary_line(summary)}")
    loss_tokens = sum(record.loss_tokens for record in manifest.shards)
    size = sum(record.bytes for record in manifest.shards)
    print(
        f"cache {run.cache_dir}: {len(manifest.shards)} shards, {loss_tokens} supervised tokens, "
        f"{size / loss_tokens:.1f} bytes each, identity {manifest.identity_digest[:12]}"
    )
    if failures or prepared.unanswered:
        raise describe_quarantine(
            failures,
            failed_responses=prepared.unanswered,
            planned_rows=prepared.corpus.counts.samples,
            url=run.cache_dir,
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
