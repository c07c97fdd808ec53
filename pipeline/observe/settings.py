"""What the person running a stage can choose about logs, progress and trackers."""

from __future__ import annotations

from typing import Literal

from pipeline.config.schema import Settings, option

__all__ = ["ObserveSettings", "Tracker", "WorkerObserveSettings"]

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class ObserveSettings(Settings):
    """Logs, progress and trackers; nothing leaves the machine unless a tracker is named."""

    report_to: tuple[Tracker, ...] = option(
        (),
        "trackers that get every metric besides the local metrics.jsonl, which is always written: "
        "any of tensorboard (local), trackio (local), wandb, mlflow",
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


class WorkerObserveSettings(ObserveSettings):
    """What stage one's workers add: numbers for a scraper."""

    prometheus_port: int | None = option(
        None,
        "port on which this worker answers /metrics in Prometheus' text format; none or 0: off. "
        "Each worker of a machine needs its own",
        ge=0,
        le=65535,
    )
    prometheus_host: str = option(
        "127.0.0.1",
        "address that /metrics listens on: this machine only, or 0.0.0.0 for scrapers from "
        "outside (a pod's port is reached from other pods, so Kubernetes needs it)",
        min_length=1,
    )
