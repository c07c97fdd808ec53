"""Stage one with a teacher behind an endpoint: a stub that fails, and a real server of vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache.io.reader import open_cache
from pipeline.cache.tools.verify import verify_cache
from pipeline.storage import Store
from tests.conftest import Stage, Tiny
from tests.endpoint_server import serve_endpoint

K = 16


def _flags(tiny: Tiny, url: str, cache: Path) -> list[object]:
    return [
        *tiny.stage_one, "--cache_dir", cache, "--teacher.engine", "openai",
        "--teacher.endpoint.urls", f"[{url}]", "--capture.temperatures", "1.0",
        "--teacher.endpoint.timeout_s", "60",
    ]  # fmt: skip


def test_a_cache_through_an_endpoint_that_fails_now_and_then(
    tiny: Tiny, stage: Stage, tmp_path: Path
) -> None:
    config = json.loads((tiny.teacher / "config.json").read_text())
    cache, key = tmp_path / "cache", "key-of-a-test"
    with serve_endpoint(vocabulary=config["vocab_size"], key=key) as endpoint:
        flags = _flags(tiny, endpoint.url, cache)
        env = {"OPENAI_API_KEY": key, "NO_PROXY": "127.0.0.1"}
        message = stage("cache_teacher", [*flags, "--capture.top_k", "32"], env=env).refused(2)
        assert "start it with --max-logprobs 32, or ask for fewer" in message
        assert not (cache / "_meta").exists()
        endpoint.failing = [None, 500, "cut", 429, None, "drop"]
        result = stage("cache_teacher", flags, env=env).ok()
        assert "need not give the same bytes again" in result.err
    assert verify_cache(Store(str(cache)), check="decode") == []
    identity = open_cache(str(cache)).manifest.identity
    assert identity["teacher"]["engine_version"] == "vllm 0.32.0 serving big"
    for file in (cache / "_meta").rglob("*"):
        if file.is_file():
            assert key.encode() not in file.read_bytes(), file
    assert key not in (cache / "README.md").read_text()
    assert "its batches are not repeated" in (cache / "README.md").read_text()


@pytest.mark.slow
def test_a_model_here_writes_what_an_endpoint_scores(
    tiny: Tiny, stage: Stage, tmp_path: Path
) -> None:
    config = json.loads((tiny.teacher / "config.json").read_text())
    with serve_endpoint(vocabulary=config["vocab_size"]) as endpoint:
        flags = [
            *_flags(tiny, endpoint.url, tmp_path / "cache"), "--num_samples", "12",
            "--generate.enabled", "--generate.writer", tiny.teacher,
            "--teacher.endpoint.writer_engine", "transformers", "--generate.max_new_tokens", "8",
            "--generate.prompt_tokens", "5",
        ]  # fmt: skip
        stage("cache_teacher", flags, env={"NO_PROXY": "127.0.0.1"}).ok()
    cache = open_cache(str(tmp_path / "cache"))
    assert verify_cache(cache.store, check="decode") == []
    assert cache.manifest.corpus_counts["responses"] > 5
    assert cache.manifest.identity["teacher"]["engine"] == "openai"


@pytest.fixture
def vllm_server(tiny: Tiny, tmp_path: Path) -> Iterator[str]:
    """Serve the tiny teacher by vLLM's own command, on this machine's CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        # What `vllm serve` starts; the command itself asks for a distribution named vllm, and the
        # CPU build has another name.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny.teacher),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-logprobs", str(K),
        "--served-model-name", "tiny", "--enforce-eager", "--max-model-len", "128",
        "--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(1 << 26),
    ]  # fmt: skip
    env = os.environ | {
        "TORCHDYNAMO_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    log = tmp_path / "vllm.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        else:
            raise AssertionError(log.read_text()[-3000:])
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_server_gives_the_targets_of_the_model_itself(
    vllm_server: str, tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    flags = _flags(tiny, f"{vllm_server}/v1", tmp_path / "cache")
    refusal = stage("cache_teacher", [*flags, "--capture.top_k", "32"]).refused(2)
    assert "start it with --max-logprobs 32, or ask for fewer with --capture.top_k" in refusal
    stage("cache_teacher", flags).ok()
    assert verify_cache(Store(str(tmp_path / "cache")), check="decode") == []
    served, own = open_cache(str(tmp_path / "cache")), open_cache(str(tiny_cache))
    version = served.manifest.identity["teacher"]["engine_version"]
    assert version.startswith("vllm 0.")
    assert "serving tiny" in version
    rows = {row.sample_id: row for row in own.rows("train")}
    compared = same = 0
    for row in served.rows("train"):
        wanted = rows[row.sample_id].targets
        for n in range(row.targets.num_positions):
            ids, logprobs = row.targets.entries(n)
            wanted_ids, wanted_logprobs = wanted.entries(n)
            compared += 1
            if ids.tolist() == wanted_ids.tolist():
                same += 1
                # Both are rounded when stored; a difference below 1e-3 may cross a step of it.
                step = 0.01 + 0.065 * np.abs(wanted_logprobs)
                assert (np.abs(logprobs - wanted_logprobs) <= step).all()
        np.testing.assert_allclose(
            row.targets.label_logprob_N, wanted.label_logprob_N, rtol=0.07, atol=0.01
        )
    assert compared > 500
    assert same > 0.98 * compared
