"""Say whether a student could start on a cache: complete, fitting, of the identity meant."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.config import option, parse_command
from pipeline.errors import CacheError, ResumeError, run_command
from stages.train_student import StudentRun

__all__ = ["CheckRun", "main"]

PROG = "python -m stages.check_cache"


class CheckRun(StudentRun):
    """Everything stage two can be told, and what is expected of its cache."""

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
        ModelError: the student has another vocabulary, or cannot be reached.
        ResumeError: the output folder holds checkpoints of another run or world.
    """
    run = parse_command(
        CheckRun,
        list(sys.argv[1:] if argv is None else argv),
        prog=PROG,
        description=__doc__ or "",
        examples=[f"{PROG} --config stages/configs/student.yaml --cache_identity 3f2a91"],
    ).settings
    from pipeline.cache.reader import open_cache

    # The identity comes first: whether it fits a student is no question about another cache.
    manifest = open_cache(run.cache_dir).manifest
    digest = manifest.identity_digest
    if run.cache_identity is not None and not digest.startswith(run.cache_identity):
        raise CacheError(
            f"{run.cache_dir}: a cache of identity {digest[:12]}",
            expected=run.cache_identity,
            do="correct cache_dir, or the identity asked for",
        )
    from pipeline.student.checkpoint import Checkpoints
    from pipeline.student.run import open_inputs

    inputs = open_inputs(
        cache_url=run.cache_dir,
        student=run.student,
        loss=run.loss,
        data=run.data,
        train=run.train,
        output=run.output,
        observe=run.observe,
        seed=run.seed,
    )
    if run.train.resume_from_checkpoint == "auto":
        identity = inputs.identity(run.world_size)
        newest = Checkpoints(inputs.output_dir, identity, keep=1).newest()
        if newest is not None and newest.world_size != run.world_size:
            raise ResumeError(
                f"{newest.folder}: written by {newest.world_size} processes, this run would have "
                f"{run.world_size}",
                expected="the same number",
                do="start as many, choose another --output_dir, or start anew with "
                "--resume_from_checkpoint never",
            )
    print(
        f"cache {run.cache_dir}: complete, {len(manifest.shards)} shards, identity {digest[:12]}",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
