"""Say whether a student could start on a cache: complete, fitting, of the identity meant."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.api.settings import StudentRun
from pipeline.config import option, parse_command
from pipeline.errors import CacheError, run_command
from pipeline.program import command_name

__all__ = ["CheckRun", "main"]

PROG = command_name("stages.check_cache")


class CheckRun(StudentRun):
    """All settings of stage two, and what is expected of its cache."""

    cache_identity: str | None = option(
        None,
        "the identity that the cache must have, or its first characters (cache-teacher prints it)",
        pattern=r"^[0-9a-f]{6,64}$",
    )
    world_size: int = option(1, "processes that will train", ge=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Look at the manifest, the tokenizer, and the newest checkpoint; no shard is read.

    This is what decides whether a cluster is asked for GPUs, so it runs on a small CPU.

    Raises:
        CacheError: incomplete (with the missing shards), damaged, or of another identity.
        ConfigError: a temperature that the cache does not hold.
        ModelError: the student has another tokenizer, or cannot be reached.
        ResumeError: the output folder holds checkpoints of another run, or such that cannot go to
            this number of processes.
    """
    run = parse_command(
        CheckRun,
        list(sys.argv[1:] if argv is None else argv),
        prog=PROG,
        description=__doc__ or "",
        examples=[f"{PROG} --config stages/configs/student.yaml --cache_identity 3f2a91"],
    ).settings
    from pipeline.data.mixture.caches import open_caches
    from pipeline.data.mixture.settings import cache_text

    # The identity comes first: whether it fits a student is no question about another cache.
    manifest = open_caches(run.cache_dir, teachers=run.data.teachers).manifest
    digest = manifest.identity_digest
    if run.cache_identity is not None and not digest.startswith(run.cache_identity):
        raise CacheError(
            f"{cache_text(run.cache_dir)}: a cache of identity {digest[:12]}",
            expected=run.cache_identity,
            do="correct cache_dir, or the identity asked for",
        )
    from pipeline.student.inputs import open_inputs
    from pipeline.student.training.checkpoint import Checkpoints
    from pipeline.student.training.distributed import Distributed
    from pipeline.student.training.resume import find_resume_point

    inputs = open_inputs(run)
    if run.train.resume_from_checkpoint != "never":
        size = run.world_size
        identity = inputs.identity(size)
        checkpoints = Checkpoints(
            inputs.output_dir,
            identity,
            keep=1,
            world_size=size,
            slices=run.train.sequence_parallel_size,
        )
        find_resume_point(checkpoints, run.train, Distributed(0, 0, size))
    shards = manifest.total().shards
    print(
        f"cache {cache_text(run.cache_dir)}: complete, {shards} shards, identity {digest[:12]}",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
