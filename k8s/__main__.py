"""`python -m k8s COMMAND`: render, check and submit the stages on a cluster; see k8s/README.md."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from k8s.cluster.objects import ROOT, Object, dump_documents
from k8s.rendering.run_config import STAGES, Stage
from pipeline.config import Settings, option, parse_command
from pipeline.errors import ConfigError, run_command

__all__ = ["main"]

PROG = "python -m k8s"
OptionsT = TypeVar("OptionsT", bound=Settings)
_USAGE = f"""usage: {PROG} COMMAND [--option VALUE ...] [-- FLAGS OF THE STAGE]

commands (each with --help):
  cache-teacher   render, check, submit and follow stage one
  train-student   the same for stage two, after a look at its cache
  sweep           a job of stage two for each point of a sweep file
  prefetch        download models and data set to the volume
  fsx-volume      volume and claim of an FSx for Lustre file system
  fsx-init        the project's folder on it, owned by the user the stages run as
  manifests       render and check everything that lies in k8s/ and docker/
  examples        write k8s/examples anew
  jobs            list the jobs of this project
  logs            follow the logs of a run"""


class PlaceOptions(Settings):
    """Where on which cluster."""

    overlay: str = option(..., "a name below k8s/overlays, or a folder with a kustomization.yaml")
    namespace: str | None = option(None, "instead of the overlay's")


class SubmitOptions(PlaceOptions):
    """One run of one stage."""

    run: str = option("default", "name of the run: part of the job's name, and its folder")
    config: str | None = option(None, "configuration of the stage; none takes the overlay's")
    nodes: int | None = option(None, "machines; none takes the overlay's", ge=1)
    image: str | None = option(
        None, "image; none takes what `make push-images` noted, else the overlay's"
    )
    queue: str | None = option(None, "Kueue's local queue")
    priority: str | None = option(None, "Kueue's priority class")
    cache_identity: str | None = option(
        None,
        "stage two: the identity its cache must have, or the first characters",
        pattern=r"^[0-9a-f]{6,64}$",
    )
    timeout_s: float | None = option(None, "stop waiting after this many seconds", gt=0)
    poll_s: float = option(10, "seconds between two looks at the job", gt=0)
    stuck_s: float = option(120, "seconds a pod may be unable to start before it counts", gt=0)


class SweepOptions(PlaceOptions):
    """Every point of a sweep file as a job of its own."""

    sweep: str = option(..., "the sweep file: a grid or a list of points")
    nodes: int | None = option(None, "machines of one job; none takes the overlay's", ge=1)
    image: str | None = option(
        None, "image; none takes what `make push-images` noted, else the overlay's"
    )
    queue: str | None = option(None, "Kueue's local queue, which decides how many run at a time")
    priority: str | None = option(None, "Kueue's priority class")
    timeout_s: float | None = option(None, "stop waiting after this many seconds", gt=0)
    poll_s: float = option(10, "seconds between two looks at a job", gt=0)


class PrefetchOptions(PlaceOptions):
    """Which models and data set, by the configurations that name them."""

    run: str = option("default", "name of the run")
    secret: str = option("hub-token", "Secret that holds the hub token under the key `token`")
    teacher_config: str | None = option(None, "of stage one; none takes the overlay's")
    student_config: str | None = option(None, "of stage two; none takes the overlay's")
    teacher_model: str | None = option(None, "instead of the configuration's")
    dataset_name: str | None = option(None, "instead of the configuration's")
    student_model: str | None = option(None, "instead of the configuration's")
    image: str | None = option(None, "image; none takes the teacher's")
    timeout_s: float | None = option(None, "stop waiting after this many seconds", gt=0)


class InitOptions(PlaceOptions):
    """The folder on the volume."""

    image: str | None = option(None, "image; none takes the teacher's")
    timeout_s: float | None = option(None, "stop waiting after this many seconds", gt=0)


class VolumeOptions(PlaceOptions):
    """An existing FSx file system, or a new one."""

    file_system: str | None = option(None, "id of an existing one, fs-...")
    mount_name: str | None = option(None, "its mount name")
    region: str | None = option(None, "its region")
    subnet: str | None = option(None, "of a new one, subnet-...")
    security_group: str | None = option(None, "of a new one, sg-...")
    storage: str = option("1200Gi", "size")


class LogsOptions(PlaceOptions):
    """Which logs."""

    run: str = option("default", "name of the run")
    stage: str | None = option(None, "cache-teacher or train-student; none takes both")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in _COMMANDS:
        raise ConfigError(f"{name}: not a command", expected=f"one of {', '.join(_COMMANDS)}")
    _COMMANDS[name](name, rest)
    return 0


def _parse(
    model: type[OptionsT], name: str, arguments: Sequence[str]
) -> tuple[OptionsT, bool, list[str]]:
    """Return options, whether it is a dry run, and the stage's own flags behind `--`."""
    ours, theirs = list(arguments), []
    if "--" in ours:
        at = ours.index("--")
        ours, theirs = ours[:at], ours[at + 1 :]
    command = parse_command(
        model,
        ours,
        prog=f"{PROG} {name}",
        description=model.__doc__ or "",
        switches={"dry_run": "print what would be applied, and ask no cluster"},
    )
    return command.settings, "dry_run" in command.switches, theirs


def _stage(name: str, arguments: Sequence[str]) -> None:
    from k8s.rendering.render import render_job

    options, dry, flags = _parse(SubmitOptions, name, arguments)
    stage: Stage = "cache-teacher" if name == "cache-teacher" else "train-student"
    if stage == "cache-teacher" and options.cache_identity is not None:
        raise ConfigError("cache_identity is given", expected="it for train-student only")
    rendered = render_job(
        stage=stage,
        run=options.run,
        overlay=options.overlay,
        config=options.config,
        flags=flags,
        nodes=options.nodes,
        image=options.image,
        namespace=options.namespace,
        queue=options.queue,
        priority=options.priority,
    )
    if dry:
        _show(rendered.documents)
        return
    from k8s.submission.submit import Patience, submit_stage

    submit_stage(
        rendered,
        cache_identity=options.cache_identity,
        patience=Patience(options.timeout_s, options.poll_s, options.stuck_s),
    )


def _sweep(name: str, arguments: Sequence[str]) -> None:
    from k8s.submission.sweep import render_sweep, submit_sweep

    options, dry, flags = _parse(SweepOptions, name, arguments)
    if flags:
        raise ConfigError(
            f"{' '.join(flags)}: flags of the stage",
            expected="settings of all points under `overrides` in the sweep file",
        )
    jobs = render_sweep(
        options.sweep,
        overlay=options.overlay,
        nodes=options.nodes,
        image=options.image,
        namespace=options.namespace,
        queue=options.queue,
        priority=options.priority,
    )
    if dry:
        for job in jobs:
            _show(job.documents)
        return
    from k8s.submission.submit import Patience

    submit_sweep(jobs, patience=Patience(options.timeout_s, options.poll_s))


def _prefetch(name: str, arguments: Sequence[str]) -> None:
    from k8s.rendering.operations import prefetch_job

    options, dry, _ = _parse(PrefetchOptions, name, arguments)

    def flags(*names: str) -> tuple[str, ...]:
        given = ((field, getattr(options, field)) for field in names)
        return tuple(word for field, value in given if value for word in (f"--{field}", value))

    documents = prefetch_job(
        overlay=options.overlay,
        secret=options.secret,
        run=options.run,
        teacher_config=options.teacher_config,
        student_config=options.student_config,
        teacher_flags=flags("teacher_model", "dataset_name"),
        student_flags=flags("student_model"),
        image=options.image,
        namespace=options.namespace,
    )
    _run_once(documents, dry=dry, timeout_s=options.timeout_s)


def _fsx_init(name: str, arguments: Sequence[str]) -> None:
    from k8s.rendering.operations import fsx_init_job

    options, dry, _ = _parse(InitOptions, name, arguments)
    documents = fsx_init_job(
        overlay=options.overlay, image=options.image, namespace=options.namespace
    )
    _run_once(documents, dry=dry, timeout_s=options.timeout_s)


def _fsx_volume(name: str, arguments: Sequence[str]) -> None:
    from k8s.rendering.operations import fsx_volume

    options, dry, _ = _parse(VolumeOptions, name, arguments)
    documents = fsx_volume(**options.model_dump())
    if dry:
        _show(documents)
        return
    from k8s.cluster.kubectl import Kubectl
    from k8s.submission.submit import apply

    apply(Kubectl(), documents)


def _run_once(documents: list[Object], *, dry: bool, timeout_s: float | None) -> None:
    if dry:
        _show(documents)
        return
    from k8s.submission.submit import run_once

    run_once(documents, timeout_s=timeout_s)


def _manifests(_name: str, _arguments: Sequence[str]) -> None:
    from k8s.rendering.manifests import check_everything

    check_everything()


def _examples(_name: str, _arguments: Sequence[str]) -> None:
    from k8s.rendering.manifests import example_files

    for name, text in example_files().items():
        file = ROOT / "examples" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(ROOT.parent))


def _jobs(name: str, arguments: Sequence[str]) -> None:
    from k8s.submission.status import list_jobs

    options, _, _ = _parse(PlaceOptions, name, arguments)
    list_jobs(options.overlay, options.namespace)


def _logs(name: str, arguments: Sequence[str]) -> None:
    from k8s.submission.status import follow_logs

    options, _, _ = _parse(LogsOptions, name, arguments)
    if options.stage is not None and options.stage not in STAGES:
        raise ConfigError(f"stage {options.stage!r}: unknown", expected=" or ".join(STAGES))
    follow_logs(options.overlay, options.namespace, run=options.run, stage=options.stage)


def _show(documents: Sequence[Object]) -> None:
    print(dump_documents(documents), end="")


_COMMANDS: dict[str, Callable[[str, Sequence[str]], None]] = {
    "cache-teacher": _stage,
    "train-student": _stage,
    "sweep": _sweep,
    "prefetch": _prefetch,
    "fsx-volume": _fsx_volume,
    "fsx-init": _fsx_init,
    "manifests": _manifests,
    "examples": _examples,
    "jobs": _jobs,
    "logs": _logs,
}


if __name__ == "__main__":
    sys.exit(run_command(main))
