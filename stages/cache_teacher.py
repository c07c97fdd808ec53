"""Stage one: run the teacher once over a corpus and write its sparse logits as a cache."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.config import dump_yaml, parse_command
from pipeline.config.command import command_line
from pipeline.errors import run_command
from stages.settings import StudentRun, TeacherRun

if TYPE_CHECKING:
    from pipeline.cache.layout.manifest import Manifest
    from pipeline.cache.layout.quarantine import QuarantinedRow
    from pipeline.observe.shares import Shares
    from pipeline.storage import Store
    from pipeline.teacher.prepare import Prepared

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
            "timing run) and exit",
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
    from pipeline.cache.layout.quarantine import read_quarantine
    from pipeline.observe.logs import configure_logging
    from pipeline.observe.prometheus import serve_metrics
    from pipeline.observe.shares import Shares
    from pipeline.storage import Store
    from pipeline.teacher.capture.fit_tau import fit_tau
    from pipeline.teacher.capture.run import fill_cache
    from pipeline.teacher.estimate import check_resources, estimate
    from pipeline.teacher.fleet.processes import worker_name
    from pipeline.teacher.fleet.signals import interruptible
    from pipeline.teacher.generation.identity import reject_written_responses
    from pipeline.teacher.generation.run import write_responses
    from pipeline.teacher.prepare import prepare

    configure_logging(run.observe.log_level)
    store = Store(run.cache_dir)
    shares = Shares()
    dry_run = "dry_run" in command.switches
    # Before anything else: a port that is taken is said at once, not after the tokenising.
    endpoint = serve_metrics(
        shares,
        port=None if dry_run else run.observe.prometheus_port,
        host=run.observe.prometheus_host,
        worker=worker_name(),
    )
    responses = None
    with interruptible(), endpoint:
        with shares.spent("preparing"):
            prepared = prepare(
                run.teacher, run.corpus, run.capture, seed=run.seed, generate=run.generate
            )
        if dry_run:
            _print_plan(prepared, store)
            return 0
        task, writing = prepared.capture, prepared.writing
        del prepared  # an upper bound's samples leave the scratch disk with the task that held them
        check_resources(estimate(task, writing), store)
        if writing is None:
            reject_written_responses(store, task.identity)
        else:
            responses = write_responses(
                writing, store=store, progress_every_s=run.observe.progress_every_s
            )
            task = task.with_corpus(responses.corpus)
        task = fit_tau(task, store)
        if responses is not None:
            check_resources(estimate(task), store)
        manifest = fill_cache(
            task,
            store=store,
            command=command_line(PROG, arguments),
            # How a worker logs and is watched is not the cache's: each would write it otherwise.
            resolved_config=dump_yaml(run, without=("observe",)),
            progress_every_s=run.observe.progress_every_s,
            retry_quarantined="retry_quarantined" in command.switches,
            shares=shares,
        )
        rows = read_quarantine(store)
    _report(manifest, shares, run.cache_dir)
    _report_quarantined(
        rows,
        {} if responses is None else responses.quarantined,
        planned_rows=task.corpus.counts.samples,
        url=run.cache_dir,
    )
    return 0


def _print_plan(prepared: Prepared, store: Store) -> None:
    """Print what a run would take, by what is there of responses and tau; write nothing."""
    from pipeline.teacher.capture.fit_tau import fit_tau
    from pipeline.teacher.estimate import print_estimate
    from pipeline.teacher.generation.read import finished_responses

    task, writing = prepared.capture, prepared.writing
    responses = None if writing is None else finished_responses(writing, store)
    if responses is not None:
        task, writing = task.with_corpus(responses.corpus), None
    if writing is None:
        task = fit_tau(task, store, keep=False)
    print_estimate(task, writing, store)


def _report(manifest: Manifest, shares: Shares, url: str) -> None:
    """Print what this worker did, and what the cache holds."""
    from pipeline.observe.shares import summary_line

    summary = shares.summary()
    if summary.counts:
        print(f"this worker: {summary_line(summary)}")
    total, digest = manifest.total(), manifest.identity_digest[:12]
    print(
        f"cache {url}: {total.shards} shards, {total.loss_tokens} supervised tokens, "
        f"{total.bytes / total.loss_tokens:.1f} bytes each, identity {digest}"
    )


def _report_quarantined(
    rows: Mapping[str, tuple[QuarantinedRow, ...]],
    responses: Mapping[str, tuple[QuarantinedRow, ...]],
    *,
    planned_rows: int,
    url: str,
) -> None:
    """End the run with an error that lists what is quarantined, if anything is."""
    from pipeline.cache.layout.quarantine import describe_quarantine

    if rows or responses:
        raise describe_quarantine(rows, responses=responses, planned_rows=planned_rows, url=url)


if __name__ == "__main__":
    sys.exit(run_command(main))
