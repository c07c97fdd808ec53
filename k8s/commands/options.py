"""The options of each command, and how they are read from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from k8s.cluster.objects import Object, dump_documents
from k8s.cluster.workloads import Operator
from pipeline.config import Settings, option, parse_command

__all__ = [
    "PROG",
    "InitOptions",
    "LogsOptions",
    "PlaceOptions",
    "PrefetchOptions",
    "PrepareOptions",
    "SubmitOptions",
    "SweepOptions",
    "TeardownOptions",
    "VolumeOptions",
    "parse",
    "show",
]

PROG = "python -m k8s"
OptionsT = TypeVar("OptionsT", bound=Settings)


class PlaceOptions(Settings):
    """Where on which cluster."""

    overlay: str = option(..., "a name below k8s/overlays, or a folder with a kustomization.yaml")
    namespace: str | None = option(None, "instead of the overlay's")
    instance: str | None = option(
        None, "type of the nodes instead of the overlay's: ml.p5en.48xlarge, or p5en"
    )


class _JobOptions(PlaceOptions):
    """What all commands that submit a run have."""

    image: str | None = option(
        None, "image; none takes the digest that `make push-images` wrote, else the overlay's"
    )
    queue: str | None = option(None, "Kueue's local queue, which decides how many run at a time")
    priority: str | None = option(None, "Kueue's priority class")
    timeout_s: float | None = option(None, "stop waiting after this many seconds", gt=0)
    poll_s: float = option(10, "seconds between two queries of a job's state", gt=0)


class _RunOptions(_JobOptions):
    """One run."""

    run: str = option("default", "name of the run: part of the job's name, and its folder")
    config: str | None = option(None, "configuration of the stage; none takes the overlay's")
    stuck_s: float = option(
        120, "seconds that a pod may be unable to start before the job counts as failed", gt=0
    )


class _SizeOptions(PlaceOptions):
    """Of the jobs of both stages."""

    nodes: int | None = option(None, "machines of one job; none takes the overlay's", ge=1)
    topology: str | None = option(
        None, "label of a network level within which Kueue places the workers, where it can"
    )
    operator: Operator = option(
        "kubeflow", "who runs stage two: the training operator, HyperPod's own, or Trainer v2"
    )


class SubmitOptions(_RunOptions, _SizeOptions):
    """One run of one stage."""

    cache_identity: str | None = option(
        None,
        "stage two: the identity its cache must have, or the first characters",
        pattern=r"^[0-9a-f]{6,64}$",
    )


class PrepareOptions(_RunOptions):
    """The corpus that a run of stage one would read, prepared on CPUs."""

    workers: int = option(2, "pods, which share the work", ge=1)
    node_selector: str | None = option(
        None, "labels of the nodes to use, key=value, several with commas; none takes any node"
    )


class SweepOptions(_JobOptions, _SizeOptions):
    """Every point of a sweep file as a job of its own."""

    sweep: str = option(..., "the sweep file: a grid or a list of points")


class PrefetchOptions(PlaceOptions):
    """Which models and data set, by the configurations that name them."""

    run: str = option("default", "name of the run")
    secret: str = option("hub-token", "Secret with the hub token under the key `token`, or none")
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
    throughput: int = option(
        250, "of a new one: MB/s of each TiB; 125, 250, 500 or 1000", ge=125, le=1000
    )
    efa: bool = option(False, "of a new one: clients over EFA (large systems, nodes with EFA)")


class TeardownOptions(PlaceOptions):
    """What may go."""

    secret: str = option("hub-token", "Secret with the hub token, or none")
    data: str | None = option(
        None, "id of the file system that is deleted with its data; none asks on the terminal"
    )
    yes: bool = option(False, "delete the rest without asking")


class LogsOptions(PlaceOptions):
    """Which logs."""

    run: str = option("default", "name of the run")
    stage: str | None = option(
        None, "cache-teacher, train-student or prepare-corpus; none takes all"
    )


def parse(
    model: type[OptionsT], name: str, arguments: Sequence[str]
) -> tuple[OptionsT, bool, list[str]]:
    """Return options, whether it is a dry run, and the stage's own flags behind `--`.

    Raises:
        ConfigError: with every mistake in the flags.
    """
    ours, theirs = list(arguments), []
    if "--" in ours:
        at = ours.index("--")
        ours, theirs = ours[:at], ours[at + 1 :]
    command = parse_command(
        model,
        ours,
        prog=f"{PROG} {name}",
        description=model.__doc__ or "",
        switches={"dry_run": "print what would be applied; contact no cluster"},
    )
    return command.settings, "dry_run" in command.switches, theirs


def show(documents: Sequence[Object]) -> None:
    """Print objects as YAML: what a dry run does instead of applying them."""
    print(dump_documents(documents), end="")
