"""Prepare the corpus of stage one on CPUs, before any teacher is loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.api.settings import StudentRun, TeacherRun
from pipeline.config import parse_command
from pipeline.errors import run_command
from pipeline.program import command_name
from stages.defaults import TEACHER_DEFAULT, report_teacher_default

if TYPE_CHECKING:
    from pipeline.teacher.capture.source import PreparedShards
    from pipeline.teacher.generation.shards import PromptShards

__all__ = ["TeacherRun", "main"]

PROG = command_name("stages.prepare_corpus")


def main(argv: Sequence[str] | None = None) -> int:
    """Tokenise what is missing of the corpus; any number of workers share the work."""
    command = parse_command(
        TeacherRun,
        list(sys.argv[1:] if argv is None else argv),
        prog=PROG,
        description=__doc__ or "",
        examples=[
            PROG,
            f"{PROG} --teacher_model Qwen/Qwen2-7B-Instruct --dataset_name mlabonne/FineTome-100k "
            "--corpus.prepared s3://bucket/finetome-qwen2",
        ],
        elsewhere={"stage two, train-student": StudentRun},
        default=TEACHER_DEFAULT,
    )
    run = command.settings
    from pipeline.observe.logs import configure_logging
    from pipeline.observe.shares import Shares
    from pipeline.teacher.fleet.signals import interruptible
    from pipeline.teacher.prepare import corpus_source, open_corpus

    configure_logging(run.observe.log_level)
    report_teacher_default(command)
    shares = Shares()
    work = open_corpus(
        run.teacher,
        run.corpus,
        seed=run.seed,
        cache_url=run.cache_dir,
        generate=run.generate,
    )
    with (
        interruptible(),
        work.preparing(lease_s=run.capture.lease_s, shares=shares) as preparation,
    ):
        preparation.wait()
        source = corpus_source(work, run.capture, run.generate)
        preparation.wait_until(lambda: _is_whole(source))
    counts, mine = source.counts(), shares.summary().counts
    what = "prompts" if run.generate.enabled else "samples"
    print(
        f"corpus {work.folder.store.url}: {counts.samples} {what} ({counts.train} train, "
        f"{counts.heldout} held out), {counts.tokens} tokens in {len(work.units())} units; this "
        f"worker prepared {mine.get('units', 0)} of them, {mine.get('tokenised', 0)} tokens"
    )
    return 0


def _is_whole(source: PreparedShards | PromptShards) -> bool:
    """Look for more of the corpus; return whether that is all."""
    source.refresh()
    return source.is_complete


if __name__ == "__main__":
    sys.exit(run_command(main))
