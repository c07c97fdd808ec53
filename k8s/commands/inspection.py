"""The commands that submit nothing: manifests, katib, jobs, logs."""

from __future__ import annotations

from collections.abc import Sequence

from k8s.commands.options import LogsOptions, PlaceOptions, parse, show
from k8s.rendering.run_config import STAGES
from pipeline.errors import ConfigError

__all__ = ["jobs", "katib", "logs", "manifests"]


def manifests(_name: str, _arguments: Sequence[str]) -> None:
    """Render and check every manifest; lint Dockerfiles, shell and YAML."""
    from k8s.rendering.manifests import check_everything

    check_everything()


def katib(_name: str, _arguments: Sequence[str]) -> None:
    """Print the student as a Katib Experiment: an example to start from."""
    from k8s.rendering.manifests import katib_example

    show(katib_example())


def jobs(name: str, arguments: Sequence[str]) -> None:
    """List the jobs of this project."""
    from k8s.submission.status import list_jobs

    options, _, _ = parse(PlaceOptions, name, arguments)
    list_jobs(options.overlay, options.namespace)


def logs(name: str, arguments: Sequence[str]) -> None:
    """Follow the logs of a run."""
    from k8s.submission.status import follow_logs

    options, _, _ = parse(LogsOptions, name, arguments)
    known = (*STAGES, "prepare-corpus")
    if options.stage is not None and options.stage not in known:
        raise ConfigError(f"stage {options.stage!r}: unknown", expected=" or ".join(known))
    follow_logs(options.overlay, options.namespace, run=options.run, stage=options.stage)
