"""The endpoint, scraped over a real socket and read by Prometheus' own parser."""

from __future__ import annotations

import math
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, Gauge
from prometheus_client.parser import text_string_to_metric_families

from pipeline.errors import ConfigError
from pipeline.observe.metrics import open_sinks
from pipeline.observe.prometheus import serve_metrics
from pipeline.observe.settings import ObserveSettings
from pipeline.observe.shares import Shares


class _Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    return {
        sample.name + "".join(f"{{{k}={v}}}" for k, v in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_a_scraper_sees(port: int) -> None:
    clock = _Clock()
    shares = Shares(clock=clock)
    sparsified = [0.0]
    shares.inside("teacher", "sparsifier", lambda: sparsified[0])
    with serve_metrics(shares, port=port, host="127.0.0.1", worker="node-3:17"):
        shares.level(planned_tokens=5000, planned_shards=4)
        with shares.spent("teacher"):
            clock.now_s += 8
            sparsified[0] += 2
            shares.add(tokens=1000)
            seen = _scrape(port)  # in the middle of a call
        assert seen["distill_tokens_total"] == 1000
        assert seen["distill_tokens_per_second"] == 125
        assert seen["distill_time_seconds_total{part=teacher}"] == 6
        assert seen["distill_time_seconds_total{part=sparsifier}"] == 2
        assert seen["distill_wall_seconds_total"] == 8
        assert seen["distill_planned_tokens"] == 5000
        assert seen["distill_planned_shards"] == 4
        assert seen["distill_worker_info{worker=node-3:17}"] == 1
        assert seen["process_resident_memory_bytes"] > 1e6
        shares.add(tokens=24, shards=1, loss_tokens=500, bytes=77)
        seen = _scrape(port)
        assert seen["distill_tokens_total"] == 1024
        assert seen["distill_loss_tokens_total"] == 500
        assert seen["distill_shards_total"] == 1
        assert seen["distill_bytes_total"] == 77


def test_a_counter_never_falls(port: int) -> None:
    """Workers in other processes tell the sparsifier's time only after the call."""
    clock = _Clock()
    shares = Shares(clock=clock)
    sparsified = [0.0]
    shares.inside("teacher", "sparsifier", lambda: sparsified[0])
    with (
        serve_metrics(shares, port=port, host="127.0.0.1"),
        shares.spent("teacher"),
    ):
        shown = []
        for late in (0.0, 3.0, 0.0, 0.0):
            clock.now_s += 2
            sparsified[0] += late
            shown.append(_scrape(port)["distill_time_seconds_total{part=teacher}"])
    assert shown == [2, 2, 3, 5]


def test_the_librarys_own_registry_stays_out(port: int) -> None:
    foreign = Gauge("vllm_like_metric", "of another library")
    try:
        before = set(REGISTRY._names_to_collectors)
        with serve_metrics(Shares(), port=port, host="127.0.0.1"):
            assert not any(name.startswith("vllm") for name in _scrape(port))
            assert set(REGISTRY._names_to_collectors) == before
    finally:
        REGISTRY.unregister(foreign)


def test_after_the_run_nothing_listens_and_no_thread_is_left(port: int) -> None:
    threads = threading.active_count()
    for _ in range(2):  # the same port again at once
        with serve_metrics(Shares(), port=port, host="127.0.0.1"):
            _scrape(port)
        with pytest.raises(urllib.error.URLError):
            _scrape(port)
    assert threading.active_count() <= threads


@pytest.mark.parametrize("off", [None, 0])
def test_off_unless_asked_for(off: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with serve_metrics(Shares(), port=off, host="127.0.0.1"):
        pass


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield int(other.getsockname()[1])


def _refusal(port: int, host: str) -> str:
    with pytest.raises(ConfigError) as caught, serve_metrics(Shares(), port=port, host=host):
        pass
    return str(caught.value)


def test_a_taken_port_is_named(taken: int) -> None:
    said = _refusal(taken, "127.0.0.1")
    assert said.startswith(f"observe.prometheus_port: cannot listen on 127.0.0.1:{taken} (Address")
    assert "expected a free port of this machine" in said
    assert "--observe.prometheus_port" in said


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_refused(host: str, port: int) -> None:
    assert f"cannot listen on {host}:{port} (" in _refusal(port, host)


def test_a_missing_package_is_said(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    assert "the package prometheus_client is missing" in _refusal(port, "127.0.0.1")


def test_what_a_scraper_sees_of_a_training(port: int, tmp_path: Path) -> None:
    settings = ObserveSettings(prometheus_port=port)
    sink = open_sinks(settings, tmp_path)
    sink.log(3, {"train/loss": 2.5, "throughput/tokens_per_s": 100.0})
    sink.log(4, {"train/loss": 2.25, "heldout/kl_bucketed": float("nan")})
    seen = _scrape(port)
    assert seen["distill_step"] == 4
    assert seen["distill_train_loss"] == 2.25
    assert seen["distill_throughput_tokens_per_s"] == 100
    assert math.isnan(seen["distill_heldout_kl_bucketed"])
    assert "process_resident_memory_bytes" in seen
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        open_sinks(settings, tmp_path)
    sink.close()
    with pytest.raises(urllib.error.URLError):
        _scrape(port)
    # The other ranks serve nothing.
    open_sinks(settings, tmp_path, is_writer=False).close()
