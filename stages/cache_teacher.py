"""Stage one: run the teacher once over a corpus and write its sparse logits as a cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.config import dump_yaml, parse_command
from pipeline.config.command import command_line
from pipeline.errors import run_command
from stages.settings import StudentRun, TeacherRun

__all__ = ["TeacherRun", "main"]

PROG = "python -m stages.cache_teacher"


def main(argv: Sequence[str] | None = None) -> int:
    """Run stage one; the same command again goes on where it stopped."""
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
            unanswered=prepared.unanswered,
            planned_rows=prepared.corpus.counts.samples,
            url=run.cache_dir,
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
