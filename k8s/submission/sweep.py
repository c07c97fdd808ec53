"""A sweep on a cluster: one PyTorchJob per point, each named by what it changes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k8s.checks.job_rules import LONGEST_NAME
from k8s.cluster.kubectl import Kubectl, overlay_folder, render_kustomization
from k8s.cluster.objects import find_job, volume_root
from k8s.rendering.render import RenderedJob, render_job
from k8s.rendering.run_config import Stage
from k8s.submission.submit import JobFailed, Patience, begin_stage, run_to_end
from pipeline.api.settings import StudentRun
from pipeline.config import dump_yaml
from pipeline.errors import ConfigError
from pipeline.sweeps.file import read_sweep_file
from pipeline.sweeps.plan import settings_digest, slug
from stages.sweep import read_space

__all__ = ["render_sweep", "run_name", "submit_sweep"]

_STAGE: Stage = "train-student"
_LABEL = "distill/sweep"
_DIGEST_CHARACTERS = 8


def render_sweep(
    path: str,
    *,
    overlay: str,
    nodes: int | None = None,
    image: str | None = None,
    namespace: str | None = None,
    queue: str | None = None,
    priority: str | None = None,
    **more: Any,
) -> list[RenderedJob]:
    """Render and check the job of every point; nothing is submitted.

    Args:
        path: of the sweep file.
        overlay: a name below k8s/overlays, or a folder.
        nodes: as for `render_job`, as are the others.
        image: of stage two.
        namespace: None takes the overlay's.
        queue: Kueue's local queue.
        priority: Kueue's priority class.
        more: instance, topology and operator.

    Raises:
        ConfigError: with every mistake of the file; a search, which needs its runs' results; or
            what `render_job` rejects.
    """
    file = read_sweep_file(path, StudentRun)
    if file.search is not None:
        raise ConfigError(
            f"{path}: found a search",
            expected="a grid or a list of points: a search needs the results of its runs",
            do="run it on one machine with --parallel, or give its space to Katib "
            "(`python -m k8s katib` prints an example)",
        )
    space = read_space(file)
    points = space.points()
    if space.mistakes:
        raise ConfigError(mistakes=[f"{path}: {line}" for line in space.mistakes])
    folder = overlay_folder(overlay)
    volume = volume_root(find_job(render_kustomization(folder), _STAGE, source=str(folder)))
    jobs = []
    for point in points:
        data = point.settings.model_dump(mode="json")
        # All read the sweep's caches; a relative path is on the volume.
        if isinstance(data["cache_dir"], str):
            data["cache_dir"] = _on_volume(data["cache_dir"], volume)
        else:
            for share in data["cache_dir"]:
                share["url"] = _on_volume(share["url"], volume)
        del data["output"]
        settings = type(point.settings).model_validate(data)
        with tempfile.TemporaryDirectory() as scratch:
            config = Path(scratch) / "point.yaml"
            config.write_text(dump_yaml(settings), encoding="utf-8")
            jobs.append(
                render_job(
                    stage=_STAGE,
                    run=run_name(slug(point.values), settings_digest(settings)),
                    overlay=overlay,
                    config=str(config),
                    labels={_LABEL: _word(Path(path).stem)[:63].rstrip("-")},
                    nodes=nodes,
                    image=image,
                    namespace=namespace,
                    queue=queue,
                    priority=priority,
                    **more,
                )
            )
    return jobs


def run_name(words: str, digest: str) -> str:
    """Return a run's name within what a job's name may hold: `alpha-0-5-temp-1a2b3c4d`."""
    room = LONGEST_NAME - len(_STAGE) - len("--12345678") - _DIGEST_CHARACTERS - 1
    return f"{_word(words)[:room].rstrip('-')}-{digest[:_DIGEST_CHARACTERS]}"


def submit_sweep(jobs: Sequence[RenderedJob], *, patience: Patience) -> None:
    """Apply every job, then wait until the last has ended.

    Without a queue, jobs of several nodes run one after the other: two that are half placed would
    hold their nodes and wait for each other's.

    The same call again leaves finished jobs alone, follows running ones, restarts failed ones.

    Raises:
        CacheError: stage two could not start on that cache; nothing was submitted.
        JobFailed: some of them failed, with the list; the others have ended.
        JobTimeout: one did not end in time; they go on.
    """
    kubectl = Kubectl()
    failed: list[str] = []

    def wait(job: RenderedJob) -> None:
        try:
            run_to_end(kubectl, job.submitted, patience=patience)
        except JobFailed as error:
            failed.append(str(error).rstrip("."))

    together = [job for job in jobs if job.workers == 1 or job.queue]
    one_by_one = [job for job in jobs if job.workers > 1 and not job.queue]
    for job in [job for job in together if begin_stage(job, patience=patience)]:
        wait(job)
    if one_by_one:
        print(
            f"{len(one_by_one)} jobs of several nodes, no QUEUE=: one after the other", flush=True
        )
    for job in one_by_one:
        if begin_stage(job, patience=patience):
            wait(job)
    if failed:
        lines = "".join(f"\n  - {line}" for line in failed)
        raise JobFailed(
            f"{len(failed)} of {len(jobs)} jobs failed:{lines}\nthe others have succeeded",
            do="the same command restarts the failed ones",
        )


def _on_volume(cache: str, volume: str) -> str:
    return cache if "://" in cache else str(Path(volume) / cache)


def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "sweep"
