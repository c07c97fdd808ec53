"""`make manifests`: render and check every overlay, operation and example; lint the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

from k8s.checks.validate import check_documents
from k8s.cluster.instances import INSTANCES
from k8s.cluster.kubectl import render_kustomization
from k8s.cluster.objects import ROOT, Object
from k8s.cluster.workloads import Operator
from k8s.rendering.katib import katib_experiment, trial_job
from k8s.rendering.operations import fsx_init_job, fsx_volume, prefetch_job
from k8s.rendering.preflight import check_cache_job
from k8s.rendering.prepare import prepare_corpus_job
from k8s.rendering.render import RenderedJob, render_job
from k8s.rendering.run_config import STAGES, Stage
from pipeline.errors import ConfigError, DistillError

__all__ = ["EXAMPLE_IMAGES", "check_everything", "every_render", "katib_example", "lint"]

_REGISTRY = "111122223333.dkr.ecr.us-west-2.amazonaws.com"
EXAMPLE_IMAGES = {
    "cache-teacher": f"{_REGISTRY}/distill-teacher@sha256:{'0' * 64}",
    "train-student": f"{_REGISTRY}/distill-student@sha256:{'0' * 64}",
}
"""Placeholders for the overlays that name no image of their own."""


def check_everything() -> None:
    """Check everything in k8s/ and docker/.

    Raises:
        ConfigError: with every mistake found.
        DistillError: kubectl or a linter is not installed.
    """
    mistakes: list[str] = []
    for title, render in [*every_render(), ("hadolint, shellcheck, yamllint", lint)]:
        try:
            render()
            print(f"ok      {title}", flush=True)
        except ConfigError as error:
            print(f"WRONG   {title}", flush=True)
            mistakes += error.mistakes or [f"{title}: {error}"]
    if mistakes:
        raise ConfigError(mistakes=mistakes)


def every_render() -> Iterator[tuple[str, Callable[[], list[Object]]]]:
    """Yield a title and a function that renders and checks, for all that can be rendered."""
    for folder in sorted((ROOT / "overlays").iterdir()):
        overlay = folder.name
        # As it is, for `kubectl apply -k` ...
        yield f"overlay {overlay}", partial(_check_folder, folder)
        # ... and as the submit step renders it, for each operator.
        for stage in STAGES:
            yield f"  {stage}", partial(_stage, stage, overlay)
            for operator in get_args(Operator)[1:]:
                yield f"  {stage}, {operator}", partial(_stage, stage, overlay, operator=operator)
        yield "  check-cache", partial(_preflight, overlay)
        yield "  prepare-corpus", partial(_preparation, overlay)
        image = None if overlay == "local-kind" else EXAMPLE_IMAGES["cache-teacher"]
        yield (
            "  prefetch",
            partial(prefetch_job, overlay=overlay, secret="hub-token", image=image),
        )
        yield "  fsx-init", partial(fsx_init_job, overlay=overlay)
    for name in INSTANCES:
        for stage in STAGES:
            yield f"{stage}, {name}", partial(_stage, stage, "hyperpod", instance=name)
    yield "monitoring", _monitoring
    file_system: dict[str, Any] = {"file_system": "fs-0123456789abcdef0", "mount_name": "abcdefgh"}
    yield (
        "fsx volume, existing",
        partial(fsx_volume, overlay="hyperpod", region="us-west-2", **file_system),
    )
    network: dict[str, Any] = {
        "subnet": "subnet-0123456789abcdef0",
        "security_group": "sg-0123456789abcdef0",
    }
    yield "fsx volume, new", partial(fsx_volume, overlay="hyperpod", **network)
    yield "example kueue", partial(_check_folder, ROOT / "examples/kueue")
    yield "example katib", katib_example


def _check_folder(folder: Path) -> list[Object]:
    source, documents = f"k8s/{folder.relative_to(ROOT)}", render_kustomization(folder)
    check_documents(documents, source=source, images_required=False)
    return documents


def _stage(stage: Stage, overlay: str, **more: Any) -> list[Object]:
    return _render(stage, overlay, **more).objects


def _preflight(overlay: str) -> list[Object]:
    return check_cache_job(_render("train-student", overlay), cache_identity="0123456789ab")


def _preparation(overlay: str) -> list[Object]:
    return prepare_corpus_job(_render("cache-teacher", overlay), workers=2).documents


def _monitoring() -> list[Object]:
    try:
        json.loads((ROOT / "ops/monitoring/dashboard.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"k8s/ops/monitoring/dashboard.json: {error}", expected="JSON") from None
    return _check_folder(ROOT / "ops/monitoring")


def _render(stage: Stage, overlay: str, **more: Any) -> RenderedJob:
    image = None if overlay == "local-kind" else EXAMPLE_IMAGES[stage]
    return render_job(stage=stage, run="check", overlay=overlay, image=image, **more)


def katib_example() -> list[Object]:
    """Return the student of overlay `hyperpod` as a Katib Experiment, checked.

    Raises:
        ConfigError: with every mistake found.
    """
    experiment = katib_experiment(_render("train-student", "hyperpod"))
    # What the operator will see is a trial, not the template.
    trial = trial_job(experiment[-1], name="trial-1", values={"temperature": "1.0", "alpha": "0.5"})
    for documents in (experiment, [*experiment[:-1], trial]):
        check_documents(documents, source="k8s/rendering/katib.py")
    return experiment


def lint() -> None:
    """Run hadolint, shellcheck and yamllint over k8s/ and docker/.

    Raises:
        ConfigError: with their messages.
        DistillError: one of them is not installed.
    """
    repository = ROOT.parent
    dockerfiles = sorted(repository.glob("docker/*.Dockerfile"))
    scripts = sorted([*repository.glob("docker/*.sh"), *repository.glob("k8s/**/*.sh")])
    messages: list[str] = []
    for command, files in (
        (["hadolint", "--no-color"], dockerfiles),
        (["shellcheck", "--color=never", "--format=gcc"], scripts),
        (["yamllint", "--strict", "--format=parsable", "-c", ".yamllint"], [Path(".")]),
    ):
        program = Path(sys.executable).with_name(command[0])
        if not program.exists():
            raise DistillError(f"{command[0]}: not installed", do="run `make setup-dev` first")
        done = subprocess.run(
            [program, *command[1:], *files],
            # yamllint reads the paths of its own settings from here.
            cwd=ROOT if command[0] == "yamllint" else repository,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            messages += [
                f"{command[0]}: {line}" for line in (done.stdout + done.stderr).splitlines()
            ]
    if messages:
        raise ConfigError(mistakes=messages)
