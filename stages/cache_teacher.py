"""Stage one: run the teacher once over a corpus and write its sparse logits as a cache."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pipeline.amounts import BYTES_PER_TOKEN, bytes_per_token
from pipeline.api.settings import StudentRun, TeacherRun
from pipeline.config import dump_yaml, parse_command
from pipeline.config.command import Command, command_line
from pipeline.errors import ConfigError, CorpusError, DistillError, ResourceError, run_command
from pipeline.program import command_name, target_name
from stages.defaults import TEACHER_DEFAULT, report_teacher_default

if TYPE_CHECKING:
    from pipeline.cache.layout.manifest import Manifest
    from pipeline.cache.layout.quarantine import QuarantinedRow
    from pipeline.observe.shares import Shares
    from pipeline.storage import Store
    from pipeline.teacher.fleet.pulse import Pulse
    from pipeline.teacher.prepare import Prepared

__all__ = ["PROG", "TeacherRun", "main", "teacher_command"]

_log = logging.getLogger(__name__)

PROG = command_name("stages.cache_teacher")
_ROUNDS = 3
"""Through writing and capture; the disk is bad where responses are lost again and again."""


def teacher_command(arguments: Sequence[str]) -> Command[TeacherRun]:
    """Return what a command line of this stage says.

    Raises:
        ConfigError: with all mistakes of files and flags.
    """
    return parse_command(
        TeacherRun,
        arguments,
        prog=PROG,
        description=__doc__ or "",
        switches={
            "preview": "show the first rows as the teacher will read them, without loading it, and "
            f"exit (`{target_name('preview')}` has more options)",
            "dry_run": "print the plan (samples, tokens, shards, bytes, memory, time from a short "
            "timing run) and exit",
            "retry_quarantined": "try the quarantined rows again (give it to one worker)",
            "verify": "compare every shard of a complete cache with its checksum, and capture the "
            "damaged ones again (give it to one worker)",
        },
        examples=[
            PROG,
            f"{PROG} --teacher_model Qwen/Qwen2-7B-Instruct --dataset_name mlabonne/FineTome-100k "
            "--cache_dir s3://bucket/cache",
            f"{PROG} --config stages/configs/teacher-writes.yaml",
            f"{PROG} --preview",
            f"{PROG} --dry-run",
            f"{PROG} --retry-quarantined",
        ],
        elsewhere={"stage two, train-student": StudentRun},
        default=TEACHER_DEFAULT,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run stage one; the same command again goes on where it stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = teacher_command(arguments)
    run = command.settings
    from pipeline.cache.layout.quarantine import (
        clear_quarantine,
        describe_quarantine,
        read_quarantine,
    )
    from pipeline.observe.logs import configure_logging
    from pipeline.observe.prometheus import serve_metrics
    from pipeline.observe.shares import Shares
    from pipeline.storage import Store
    from pipeline.teacher.capture.complete import complete_cache, finished_cache
    from pipeline.teacher.fleet.processes import worker_name
    from pipeline.teacher.fleet.signals import interruptible
    from pipeline.teacher.generation.run import has_responses, write_responses
    from pipeline.teacher.generation.units import RESPONSES_LOST
    from pipeline.teacher.prepare import prepare

    configure_logging(run.observe.log_level)
    report_teacher_default(command)
    if "preview" in command.switches:
        from stages.preview import preview_of, print_preview

        print_preview(preview_of(run))
        return 0
    shares = Shares()
    dry_run = "dry_run" in command.switches
    # Before anything else: a port that is taken is said at once, not after the tokenising.
    endpoint = serve_metrics(
        shares,
        port=None if dry_run else run.observe.prometheus_port,
        host=run.observe.prometheus_host,
        worker=worker_name(),
    )
    pulse = _pulse(run, watch=not dry_run)
    with interruptible(), endpoint, pulse:
        with shares.spent("preparing"):
            prepared = prepare(
                run.teacher,
                run.corpus,
                run.capture,
                seed=run.seed,
                cache_url=run.cache_dir,
                generate=run.generate,
            )
        store = Store(run.cache_dir)
        if dry_run:
            _print_plan(prepared, store)
            return 0
        verify = "verify" in command.switches
        if "retry_quarantined" in command.switches:
            finished_cache(store, prepared.capture.identity)  # not in another's folder
            _log.info("%d quarantined rows are tried again", clear_quarantine(store))
        manifest = complete_cache(store, prepared.capture.identity, checksums=verify)
        responses: Mapping[str, tuple[QuarantinedRow, ...]] = {}
        if manifest is None:
            manifest, responses = _fill(
                partial(
                    _fill_once, prepared, run, store, shares, pulse,
                    command=command_line(PROG, _lasting(arguments)), check_files=verify,
                )
            )  # fmt: skip
        else:
            _log.info("cache %s is complete", store.url)
            writing = prepared.writing
            if writing is not None and (
                verify or manifest.corpus_counts.get(RESPONSES_LOST) or not has_responses(store)
            ):
                with prepared.corpus.preparing(
                    lease_s=run.capture.lease_s, shares=shares
                ) as preparation:
                    responses = write_responses(
                        writing,
                        store=store,
                        progress_every_s=run.observe.progress_every_s,
                        wait_for_more=preparation.pause,
                        check_files=verify,
                        manifest=manifest,
                        pulse=pulse,
                    ).quarantined
        rows = read_quarantine(store)
    _report(manifest, shares, run.cache_dir)
    if rows or responses:
        planned_rows = manifest.total().rows + sum(map(len, rows.values()))
        raise describe_quarantine(
            rows, responses=responses, planned_rows=planned_rows, url=run.cache_dir
        )
    return 0


def _pulse(run: TeacherRun, *, watch: bool) -> Pulse:
    """Return what notices a teacher that is stuck."""
    from pipeline.teacher.engines.registry import engine_info
    from pipeline.teacher.fleet.pulse import PULSE_FILE, Pulse

    if not watch:
        return Pulse()
    try:
        on_gpu = engine_info(run.teacher).device == "cuda"
    except DistillError:  # told below, with all other mistakes
        on_gpu = False
    return Pulse(run.teacher.stall(on_gpu=on_gpu), file=os.environ.get(PULSE_FILE))


def _lasting(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without those that ask for something once: the card names the others."""
    once = ("verify", "retry_quarantined")
    return [one for one in arguments if one.lstrip("-").replace("-", "_") not in once]


def _fill(
    once: Callable[[], tuple[Manifest, Mapping[str, tuple[QuarantinedRow, ...]]]],
) -> tuple[Manifest, Mapping[str, tuple[QuarantinedRow, ...]]]:
    """Do what is missing of the cache; return its manifest and the responses without a text.

    Where the capture finds responses to be lost, it is back to the teacher that writes.
    """
    from pipeline.teacher.generation.units import ResponsesLost

    for _ in range(_ROUNDS - 1):
        try:
            return once()
        except ResponsesLost as error:
            _log.warning("%s; written again", error.found)
    return once()


def _fill_once(
    prepared: Prepared,
    run: TeacherRun,
    store: Store,
    shares: Shares,
    pulse: Pulse,
    *,
    command: str,
    check_files: bool,
) -> tuple[Manifest, Mapping[str, tuple[QuarantinedRow, ...]]]:
    from pipeline.teacher.capture.fit_tau import can_begin, fit_tau
    from pipeline.teacher.capture.run import fill_cache
    from pipeline.teacher.estimate import check_resources, estimate
    from pipeline.teacher.fleet.turns import wait_for_turn
    from pipeline.teacher.generation.identity import (
        reject_other_responses,
        reject_written_responses,
    )
    from pipeline.teacher.generation.run import can_write, write_responses

    task, writing = prepared.capture, prepared.writing
    if writing is None:
        reject_written_responses(store, task.identity)
    else:
        reject_other_responses(store, writing.identity)
    resolved = run.model_copy(
        update={
            "corpus": prepared.corpus.settings,
            "teacher": task.teacher.settings,
            "capture": task.settings,
        }
    )
    lost: Mapping[str, tuple[QuarantinedRow, ...]] = {}
    counts: Mapping[str, int] = {}
    with prepared.corpus.preparing(lease_s=run.capture.lease_s, shares=shares) as preparation:
        try:
            with shares.spent("preparing"):
                preparation.wait_until(
                    lambda: can_begin(task) if writing is None else can_write(writing)
                )
            check_resources(estimate(task, writing), store)
            with shares.spent("waiting"):  # before a shard is leased
                wait_for_turn(run.teacher.load_spread_s)
            if writing is not None:
                responses = write_responses(
                    writing,
                    store=store,
                    progress_every_s=run.observe.progress_every_s,
                    wait_for_more=preparation.pause,
                    check_files=check_files,
                    pulse=pulse,
                )
                task, counts = task.with_source(responses.source), responses.counts
                lost = responses.quarantined
                task.source.refresh()
                check_resources(estimate(task), store, written=True)
            task = fit_tau(task, store, pulse=pulse)
        except (ConfigError, CorpusError, ResourceError):
            preparation.stop()
            prepared.corpus.discard()
            raise
        manifest = fill_cache(
            task,
            store=store,
            command=command,
            # How a worker logs and is watched is not the cache's: each would write it otherwise.
            resolved_config=dump_yaml(resolved, without=("observe",)),
            progress_every_s=run.observe.progress_every_s,
            shares=shares,
            wait_for_more=preparation.pause,
            more_counts=counts,
            pulse=pulse,
        )
        return manifest, lost


def _print_plan(prepared: Prepared, store: Store) -> None:
    """Print what a run would take, by what is there of responses and tau; write nothing."""
    from pipeline.teacher.capture.fit_tau import fit_tau
    from pipeline.teacher.estimate import print_estimate
    from pipeline.teacher.generation.run import written_shards

    task, writing = prepared.capture, prepared.writing
    prepared.corpus.go_by(prepared.corpus.sampled())
    if writing is not None:
        written = written_shards(writing, store)
        if written is not None:
            task, writing = task.with_source(written), None
    task.source.refresh()
    if writing is None:
        task = fit_tau(task, store, keep=False)
    print_estimate(task, writing, store)


def _report(manifest: Manifest, shares: Shares, url: str) -> None:
    """Print what this worker did, and what the cache holds."""
    from pipeline.observe.shares import summary_line

    summary = shares.summary()
    if summary.counts:
        print(f"this worker: {summary_line(summary)}")
    total = manifest.total()
    print(
        f"cache {url}: {total.shards} shards, {total.loss_tokens} supervised tokens, "
        f"{bytes_per_token(total.bytes, total.loss_tokens):.1f} {BYTES_PER_TOKEN}, identity "
        f"{manifest.identity_digest[:12]}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
