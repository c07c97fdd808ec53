"""The commands that submit nothing: manifests, examples, jobs, logs."""

from __future__ import annotations

from collections.abc import Sequence

from k8s.cluster.objects import ROOT
from k8s.commands.options import LogsOptions, PlaceOptions, parse
from k8s.rendering.run_config import STAGES
from pipeline.errors import ConfigError

__all__ = ["examples", "jobs", "logs", "manifests"]


def manifests(_name: str, _arguments: Sequence[str]) -> None:
    """Render and check every manifest; lint Dockerfiles, shell and YAML."""
    from k8s.rendering.manifests import check_everything

    check_everything()


def examples(_name: str, _arguments: Sequence[str]) -> None:
    """Write k8s/examples again from the code."""
    from k8s.rendering.manifests import example_files

    for name, text in example_files().items():
        file = ROOT / "examples" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(ROOT.parent))


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
