"""The commands that submit runs: prepare-corpus, cache-teacher, train-student, sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from k8s.commands.options import PrepareOptions, SubmitOptions, SweepOptions, parse, show
from k8s.rendering.run_config import Stage
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from k8s.rendering.render import RenderedJob

__all__ = ["prepare_corpus", "stage", "sweep"]


def stage(name: str, arguments: Sequence[str]) -> None:
    """Render, check, submit and follow a stage."""
    options, dry, flags = parse(SubmitOptions, name, arguments)
    which: Stage = "cache-teacher" if name == "cache-teacher" else "train-student"
    if which == "cache-teacher" and options.cache_identity is not None:
        raise ConfigError("cache_identity is given", expected="it for train-student only")
    rendered = _render(
        which,
        options,
        flags,
        nodes=options.nodes,
        topology=options.topology,
        operator=options.operator,
    )
    if dry:
        show(rendered.objects)
        return
    from k8s.submission.submit import Patience, submit_stage

    submit_stage(
        rendered,
        cache_identity=options.cache_identity,
        patience=Patience(options.timeout_s, options.poll_s, options.stuck_s),
    )


def prepare_corpus(name: str, arguments: Sequence[str]) -> None:
    """Render, check, submit and follow the preparation of stage one's corpus."""
    from k8s.rendering.prepare import prepare_corpus_job

    options, dry, flags = parse(PrepareOptions, name, arguments)
    rendered = prepare_corpus_job(
        _render("cache-teacher", options, flags),
        workers=options.workers,
        node_selector=options.node_selector,
    )
    if dry:
        show(rendered.documents)
        return
    from k8s.submission.submit import Patience, submit_stage

    submit_stage(rendered, patience=Patience(options.timeout_s, options.poll_s, options.stuck_s))


def sweep(name: str, arguments: Sequence[str]) -> None:
    """Submit a job of stage two for each point of a sweep file; wait for all of them."""
    from k8s.submission.sweep import render_sweep, submit_sweep

    options, dry, flags = parse(SweepOptions, name, arguments)
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
        instance=options.instance,
        topology=options.topology,
        operator=options.operator,
    )
    if dry:
        for job in jobs:
            show(job.objects)
        return
    from k8s.submission.submit import Patience

    submit_sweep(jobs, patience=Patience(options.timeout_s, options.poll_s))


def _render(
    which: Stage,
    options: SubmitOptions | PrepareOptions,
    flags: Sequence[str],
    **more: Any,
) -> RenderedJob:
    from k8s.rendering.render import render_job

    return render_job(
        stage=which,
        run=options.run,
        overlay=options.overlay,
        config=options.config,
        flags=flags,
        image=options.image,
        namespace=options.namespace,
        queue=options.queue,
        priority=options.priority,
        instance=options.instance,
        **more,
    )
