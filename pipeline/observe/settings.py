"""What the person running a stage can choose about logs, progress and trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from pipeline.config.schema import Settings, option

__all__ = ["ObserveSettings", "WorkerObserveSettings"]

_TRACKERS = (
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb",
)  # fmt: skip
"""Known without a look into accelerate, whose import takes seconds; it may know more."""


class ObserveSettings(Settings):
    """Logs, progress and trackers; nothing leaves the machine unless a tracker is named."""

    report_to: tuple[str, ...] = option(
        (),
        "trackers that get every metric besides the local metrics.jsonl, which is always written: "
        "tensorboard (local), trackio (local), wandb, mlflow, or another that accelerate knows: "
        "aim, clearml, comet_ml, dvclive, swanlab, ...",
        flag="report_to",
    )
    project_name: str = option(
        "distill-logits",
        "project or experiment under which trackers file the run",
        flag="project_name",
        min_length=1,
    )
    run_name: str | None = option(
        None, "name of the run in trackers; none takes the output folder's name", flag="run_name"
    )
    progress_every_s: float = option(
        5.0, "seconds between progress lines where stderr is no terminal", gt=0
    )
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info",
        "least level that is logged; debug also lets the libraries talk",
        flag="log_level",
    )

    prometheus_port: int | None = option(
        None,
        "port on which a worker of stage one, or rank 0 of stage two, answers /metrics in "
        "Prometheus' text format; none or 0: off. Each worker of a machine needs its own",
        ge=0,
        le=65535,
    )
    prometheus_host: str = option(
        "127.0.0.1",
        "address that /metrics listens on: this machine only, or 0.0.0.0 for scrapers from "
        "outside (a pod's port is reached from other pods, so Kubernetes needs it)",
        min_length=1,
    )

    @field_validator("report_to")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        others = [name for name in names if name not in _TRACKERS]
        if others:
            from pipeline.observe.accelerate_trackers import registered_trackers

            known = sorted({*_TRACKERS, *registered_trackers()})
            unknown = [name for name in others if name not in known]
            if unknown:
                raise ValueError(f"found {', '.join(unknown)}, expected any of {', '.join(known)}")
        return names


class WorkerObserveSettings(ObserveSettings):
    """What stage one's workers have of it: no trackers."""

    @field_validator("report_to")
    @classmethod
    def _none(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names:
            raise ValueError(
                f"found {', '.join(names)}, expected none: stage one reports in its log and by "
                "--observe.prometheus_port; trackers are stage two's"
            )
        return names
