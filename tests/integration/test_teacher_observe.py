"""What a worker says of its time: one line at the end, and an endpoint while it works."""

from __future__ import annotations

import re
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Stage, Tiny
from tests.stage_runner import Running


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_summary_says_where_the_time_went(tiny: Tiny, stage: Stage, tmp_path: Path) -> None:
    result = stage("cache_teacher", [*tiny.stage_one, "--cache_dir", tmp_path / "cache"]).ok()
    (line,) = [row for row in result.out.splitlines() if row.startswith("this worker:")]
    shares = dict(re.findall(r"(teacher|sparsifier|encoding|store|leases) ([\d.]+) %", line))
    assert shares.keys() == {"teacher", "sparsifier", "encoding", "store", "leases"}
    assert float(shares["teacher"]) > 0
    assert sum(map(float, shares.values())) <= 201  # two threads
    again = stage("cache_teacher", [*tiny.stage_one, "--cache_dir", tmp_path / "cache"]).ok()
    assert "this worker:" not in again.out  # nothing was made


def test_the_endpoint_answers_while_the_worker_works(
    tiny: Tiny, start: Callable[..., Running], tmp_path: Path
) -> None:
    port = _free_port()
    flags = ["--cache_dir", tmp_path / "cache", "--observe.prometheus_port", str(port)]
    worker = start("cache_teacher", [*tiny.stage_one, *flags])
    text, end = "", time.monotonic() + 60
    while "distill_tokens_total" not in text:
        assert time.monotonic() < end, text
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                text = answer.read().decode()
        except OSError:
            time.sleep(0.01)
    worker.wait().ok()
    assert 'distill_time_seconds_total{part="teacher"}' in text
    assert float(re.search(r"^distill_planned_tokens (\S+)$", text, re.MULTILINE)[1]) > 0


def test_a_taken_port_is_said_before_any_work(tiny: Tiny, stage: Stage, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        flags = ["--cache_dir", tmp_path / "cache", "--observe.prometheus_port", port]
        result = stage("cache_teacher", [*tiny.stage_one, *flags])
    assert "another --observe.prometheus_port" in result.refused(2)
    assert not (tmp_path / "cache").exists()
