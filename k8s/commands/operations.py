"""The commands around the stages: prefetch, fsx-init, fsx-volume, teardown."""

from __future__ import annotations

from collections.abc import Sequence

from k8s.cluster.objects import Object
from k8s.commands.options import (
    InitOptions,
    PrefetchOptions,
    TeardownOptions,
    VolumeOptions,
    parse,
    show,
)

__all__ = ["fsx_init", "fsx_volume", "prefetch", "teardown"]


def prefetch(name: str, arguments: Sequence[str]) -> None:
    """Download models and data set to the volume."""
    from k8s.rendering.operations import prefetch_job

    options, dry, _ = parse(PrefetchOptions, name, arguments)

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


def fsx_init(name: str, arguments: Sequence[str]) -> None:
    """Make the project's folder on the volume."""
    from k8s.rendering.operations import fsx_init_job

    options, dry, _ = parse(InitOptions, name, arguments)
    documents = fsx_init_job(
        overlay=options.overlay, image=options.image, namespace=options.namespace
    )
    _run_once(documents, dry=dry, timeout_s=options.timeout_s)


def fsx_volume(name: str, arguments: Sequence[str]) -> None:
    """Apply volume and claim of an FSx file system."""
    from k8s.rendering.operations import fsx_volume as volume_objects

    options, dry, _ = parse(VolumeOptions, name, arguments)
    documents = volume_objects(**options.model_dump(exclude={"instance"}))
    if dry:
        show(documents)
        return
    from k8s.cluster.kubectl import Kubectl
    from k8s.submission.admission import apply

    apply(Kubectl(), documents)


def teardown(name: str, arguments: Sequence[str]) -> None:
    """Delete what this project has in a namespace."""
    from k8s.submission.status import namespace_of
    from k8s.submission.teardown import teardown as delete_all

    options, dry, _ = parse(TeardownOptions, name, arguments)
    place = namespace_of(options.overlay, options.namespace)
    delete_all(place, secret=options.secret, data=options.data, yes=options.yes, dry=dry)


def _run_once(documents: list[Object], *, dry: bool, timeout_s: float | None) -> None:
    if dry:
        show(documents)
        return
    from k8s.submission.submit import run_once

    run_once(documents, timeout_s=timeout_s)
