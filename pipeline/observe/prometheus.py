"""A worker's numbers as a Prometheus text endpoint, from a registry of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pipeline.errors import ConfigError
from pipeline.observe.shares import Shares

__all__ = ["serve_metrics"]

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
    try:
        from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
    except ImportError as error:
        raise ConfigError(
            f"observe.prometheus_port is {port}, but the package prometheus_client is missing",
            do="pip install prometheus_client, or leave the port unset",
        ) from error
    registry = CollectorRegistry()
    registry.register(_collector(shares, worker))
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
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _collector(shares: Shares, worker: str) -> Any:
    """Return what turns the account into the library's metric families, anew at every scrape."""
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
