"""A process's numbers as a Prometheus text endpoint, from a registry of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline.errors import ConfigError
from pipeline.observe.shares import Shares

__all__ = ["PrometheusSink", "gauge_name", "serve_metrics"]

_HELP = {
    "tokens": "Tokens that the teacher of this worker has read",
    "loss_tokens": "Positions whose targets this worker has written",
    "shards": "Shards that this worker has committed",
    "bytes": "Bytes of shards that this worker has committed",
    "planned_tokens": "Tokens of the whole plan, all workers",
    "planned_shards": "Shards of the whole plan, all workers",
    "recorded_shards": "Shards of the plan that are done, whoever made them",
}


@contextlib.contextmanager
def serve_metrics(
    shares: Shares, *, port: int | None, host: str, worker: str = ""
) -> Iterator[None]:
    """Answer `http://host:port/metrics` with the account while open; nothing without a port.

    Each count is a counter `distill_<name>_total`, its rate a gauge `distill_<name>_per_second`,
    each level a gauge `distill_<name>`; time is `distill_time_seconds_total{part="teacher"}`, to be
    compared with `distill_wall_seconds_total`. The usual `process_*` metrics come with them. The
    library's global registry is left alone: vLLM fills it with its own.

    Args:
        shares: asked at every scrape.
        port: none or 0 serves nothing.
        host: the address to listen on; 0.0.0.0 for scrapers from outside.
        worker: named in `distill_worker_info`.

    Raises:
        ConfigError: the port is taken or may not be used, the host is not this machine's, or the
            package prometheus_client is missing.
    """
    if not port:
        yield
        return
    _require_package(port)
    close = _serve(_collector(shares, worker), port=port, host=host)
    try:
        yield
    finally:
        close()


class PrometheusSink:
    """Serves the newest value of each metric of a training as a gauge, and its step.

    `train/loss` is `distill_train_loss`; the step is `distill_step`.

    Raises:
        ConfigError: as `serve_metrics`.
    """

    def __init__(self, *, port: int, host: str) -> None:
        """Open the endpoint; no value is there yet."""
        self._values: dict[str, float] = {}
        _require_package(port)
        self._close = _serve(_gauges(self._values), port=port, host=host)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show these values from now on."""
        # Replaced as a whole: a scrape may come in the middle.
        newest = {gauge_name(key): float(value) for key, value in values.items()}
        self._values.update({**newest, "distill_step": float(step)})

    def close(self) -> None:
        """Close the endpoint; safe to call twice."""
        close, self._close = self._close, lambda: None
        close()


def gauge_name(key: str) -> str:
    """Return the gauge of a logged metric: `train/loss` is `distill_train_loss`."""
    return f"distill_{re.sub('[^a-z0-9_]', '_', key.lower())}"


def _require_package(port: int) -> None:
    if importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError(
            f"observe.prometheus_port is {port}, but the package prometheus_client is missing",
            do="pip install prometheus_client, or leave the port unset",
        )


def _serve(collector: Any, *, port: int, host: str) -> Callable[[], None]:
    """Answer with what a collector gives; return what ends it."""
    from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"observe.prometheus_port: cannot listen on {host}:{port} ({error.strerror or error})",
            expected="a free port of this machine",
            do="choose another --observe.prometheus_port (each worker of a machine needs its own) "
            "or --observe.prometheus_host",
        ) from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close


def _gauges(values: Mapping[str, float]) -> Any:
    """Return what shows a mapping as gauges, as it is at every scrape."""
    from prometheus_client.core import GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector

    class GaugeCollector(Collector):
        def collect(self) -> Iterator[Metric]:
            for name, value in sorted(dict(values).items()):
                yield GaugeMetricFamily(name, f"As logged: {name}", value=value)

    return GaugeCollector()


def _collector(shares: Shares, worker: str) -> Any:
    """Return what turns the account into the library's metric families, again at every scrape."""
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        InfoMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector

    class SharesCollector(Collector):
        def __init__(self) -> None:
            self._shown: dict[str, float] = {}

        def collect(self) -> Iterator[Metric]:
            summary = shares.summary()
            yield InfoMetricFamily("distill_worker", "This worker", value={"worker": worker})
            yield CounterMetricFamily("distill_wall_seconds", "Wall time", value=summary.wall_s)
            time = CounterMetricFamily(
                "distill_time_seconds",
                "Time by part; parts run beside each other, so they may add up to more than wall",
                labels=["part"],
            )
            for part, seconds in sorted(summary.seconds.items()):
                # What `Shares.inside` takes out late would let a counter fall, which a scraper
                # reads as a restart.
                self._shown[part] = max(seconds, self._shown.get(part, 0.0))
                time.add_metric([part], self._shown[part])
            yield time
            for name, count in sorted(summary.counts.items()):
                text = _HELP.get(name, name)
                yield CounterMetricFamily(f"distill_{name}", text, value=count)
                yield GaugeMetricFamily(
                    f"distill_{name}_per_second",
                    f"{text}, per second over the last minute",
                    value=summary.rates[name],
                )
            for name, value in sorted(summary.levels.items()):
                yield GaugeMetricFamily(f"distill_{name}", _HELP.get(name, name), value=value)

    return SharesCollector()
