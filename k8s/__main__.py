"""`python -m k8s COMMAND`: render, check and submit the stages on a cluster; see k8s/README.md."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from k8s.commands import inspection, operations, runs
from k8s.commands.options import PROG
from pipeline.config.fields import suggestion
from pipeline.errors import ConfigError, run_command

__all__ = ["main"]

_USAGE = f"""usage: {PROG} COMMAND [--option VALUE ...] [-- FLAGS OF THE STAGE]

commands (each with --help):
  prepare-corpus  tokenise the corpus of stage one apart, on CPUs
  cache-teacher   render, check, submit and follow stage one
  train-student   the same for stage two, after a preflight check of its cache
  sweep           a job of stage two for each point of a sweep file
  prefetch        download models and data set to the volume
  fsx-volume      volume and claim of an FSx for Lustre file system
  fsx-init        the project's folder on it, owned by the user the stages run as
  manifests       render and check everything in k8s/ and docker/
  katib           print the student as a Katib Experiment, an example to start from
  teardown        delete all of this project in a namespace; data only where it is named
  jobs            list the jobs of this project
  logs            follow the logs of a run"""

_COMMANDS: dict[str, Callable[[str, Sequence[str]], None]] = {
    "prepare-corpus": runs.prepare_corpus,
    "cache-teacher": runs.stage,
    "train-student": runs.stage,
    "sweep": runs.sweep,
    "prefetch": operations.prefetch,
    "fsx-volume": operations.fsx_volume,
    "fsx-init": operations.fsx_init,
    "teardown": operations.teardown,
    "manifests": inspection.manifests,
    "katib": inspection.katib,
    "jobs": inspection.jobs,
    "logs": inspection.logs,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in _COMMANDS:
        near = suggestion(name, list(_COMMANDS))
        raise ConfigError(f"{name}: not a command", expected=f"one of {', '.join(_COMMANDS)}{near}")
    _COMMANDS[name](name, rest)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
