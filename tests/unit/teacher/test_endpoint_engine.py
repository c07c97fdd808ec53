"""The engine `openai`: right columns from both kinds of servers, and every way a server fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ConfigError, EngineStalled
from pipeline.teacher.engines.base import CaptureRequest
from pipeline.teacher.engines.endpoint import client as client_module
from pipeline.teacher.engines.endpoint import serving as serving_module
from pipeline.teacher.engines.endpoint.client import RequestRefused
from pipeline.teacher.engines.registry import check_engine, engine_info, open_engine
from pipeline.teacher.fleet.quarantine import GuardedEngine
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.columns import to_targets
from pipeline.teacher.sparsify.device import SparseScheme
from tests.endpoint_server import Endpoint, dense_logprobs, serve_endpoint

V, K = 100, 5
CAPTURE = CaptureSettings(top_k=K, temperatures=(1.0,))
SCHEME = SparseScheme(K, (1.0,))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_REST_S", 0.01)
    monkeypatch.setattr(client_module, "_LONGEST_REST_S", 0.05)
    monkeypatch.setattr(serving_module, "_PAUSE_S", 0.01)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serve_endpoint() as served:
        yield served


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": V, "model_type": "llama"}))
    return tmp_path


def _settings(*endpoints: Endpoint, **options: Any) -> TeacherSettings:
    urls = tuple(item.url for item in endpoints)
    return TeacherSettings(
        engine="openai", endpoint={"urls": urls, "timeout_s": 20, "tries": 4, **options}
    )


def _requests(count: int) -> list[CaptureRequest]:
    rng = np.random.default_rng(3)
    return [
        CaptureRequest(
            f"{n:032x}",
            rng.integers(0, V - 1, int(rng.integers(4, 12))).astype(np.int32),
            np.array([0, 2]),
        )
        for n in range(count)
    ]


def _engine(settings: TeacherSettings, folder: Path) -> Any:
    return open_engine(settings, CAPTURE, folder=folder, scheme=SCHEME, max_length=64)


def _assert_right(requests: list[CaptureRequest], answers: list[Any]) -> None:
    for request, columns in zip(requests, answers, strict=True):
        ids = request.input_ids_L
        targets, tail_N = to_targets(
            columns, SCHEME, sample_id=request.sample_id, label_N=ids[request.rows_N + 1]
        )
        for n, row in enumerate(request.rows_N.tolist()):
            log_p = dense_logprobs(ids[: row + 1].tolist(), V)
            top = np.sort(np.argsort(-log_p)[:K])
            found_ids, found = targets.entries(n)
            assert found_ids.tolist() == top.tolist()
            np.testing.assert_allclose(found, log_p[top], atol=1e-5)
            np.testing.assert_allclose(targets.label_logprob_N[n], log_p[ids[row + 1]], atol=1e-5)
            np.testing.assert_allclose(tail_N[n], 1 - np.exp(log_p[top]).sum(), atol=1e-5)
            entropy = -(np.exp(log_p) * log_p).sum()
            assert 0 < targets.entropy_NG[n, 0] <= entropy + 1e-4


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_columns_of_both_kinds_from_several_servers(kind: str, folder: Path) -> None:
    with serve_endpoint(kind=kind) as one, serve_endpoint(kind=kind) as two:
        settings = _settings(one, two, requests=3)
        info = engine_info(settings)
        assert (info.engine, info.engine_version) == ("openai", f"{kind} 0.32.0 serving big")
        check_engine(settings, CAPTURE, 64)
        engine = _engine(settings, folder)
        requests, tokens = _requests(24), []
        _assert_right(requests, engine.capture(requests, on_tokens=tokens.append))
        assert sum(tokens) == sum(r.input_ids_L.size for r in requests)
        assert min(one.asked, two.asked) > 4
        assert max(one.most_at_once, two.most_at_once) <= 3
        engine.close()


def test_the_promise_of_the_same_bytes_is_taken_back(
    endpoint: Endpoint, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _engine(_settings(endpoint), folder)
    assert "need not give the same bytes again" in caplog.text


def test_the_very_first_request_is_tried_again(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is still loading, or a proxy before it, answers 503."""
    pauses: list[float] = []
    monkeypatch.setattr("pipeline.teacher.engines.endpoint.serving.time.sleep", pauses.append)
    endpoint.starting = 2
    assert engine_info(_settings(endpoint)).engine_version == "vllm 0.32.0 serving big"
    assert (endpoint.starting, len(pauses)) == (0, 2)
    endpoint.starting = 3
    with pytest.raises(EngineStalled, match=r"does not answer \(503 starting\)"):
        engine_info(_settings(endpoint))


@pytest.mark.parametrize("failure", [429, 500, 503, 408, "cut", "drop", "hang"])
def test_what_passes_is_asked_again(failure: Any, endpoint: Endpoint, folder: Path) -> None:
    engine = _engine(_settings(endpoint, timeout_s=0.5), folder)
    endpoint.failing = [failure, failure]
    requests = _requests(4)
    _assert_right(requests, engine.capture(requests))
    assert endpoint.asked >= 5


def test_a_server_that_dies_leaves_its_work_to_the_others(folder: Path) -> None:
    with serve_endpoint() as one, serve_endpoint() as two:
        engine = _engine(_settings(one, two), folder)
        two.down = True
        requests = _requests(12)
        _assert_right(requests, engine.capture(requests))
        assert one.asked >= 12


def test_no_server_for_a_long_time_ends_the_worker(endpoint: Endpoint, folder: Path) -> None:
    engine = _engine(_settings(endpoint, patience_s=0.3), folder)
    endpoint.down = True
    with pytest.raises(EngineStalled, match=r"no server of the teacher has answered for 0\.3 s"):
        engine.capture(_requests(2))
    endpoint.down = False
    requests = _requests(2)
    _assert_right(requests, engine.capture(requests))


def test_a_server_that_goes_after_its_first_answers_is_no_rows_fault(
    endpoint: Endpoint, folder: Path
) -> None:
    engine = _engine(_settings(endpoint, patience_s=0.3), folder)

    def gone(_tokens: int) -> None:
        endpoint.down = True

    with pytest.raises(EngineStalled, match=r"has answered for 0\.3 s"):
        engine.capture(_requests(40), on_tokens=gone)
    endpoint.down = False
    asked = endpoint.asked
    # What was answered before is not asked again, whatever single row is asked for in between.
    engine.capture(_requests(60)[-1:])
    requests = _requests(40)
    _assert_right(requests, engine.capture(requests))
    assert endpoint.asked - asked < 41


@pytest.mark.parametrize("how", ["500 for one row", "400 for one row"])
def test_a_row_that_no_server_can_answer_is_quarantined(
    how: str, endpoint: Endpoint, folder: Path
) -> None:
    engine = _engine(_settings(endpoint), folder)
    guarded = GuardedEngine(engine, tries=2, witnesses=list)
    requests = _requests(8)
    bad = requests[3]
    if how.startswith("5"):
        bad.input_ids_L[1] = endpoint.broken_for = V - 1
        answered = guarded.capture(requests)
        left = [request for request in requests if request is not bad]
        _assert_right(left, list(answered.columns))
        assert [row.sample_id for row in answered.quarantined] == [bad.sample_id]
        assert "CUDA error" in answered.quarantined[0].error
        # What was answered beside it was not asked again each time; 45 with the harmless ones.
        assert endpoint.asked < 50
        return
    endpoint.failing = [400]
    with pytest.raises(RequestRefused, match="400 no"):
        engine.capture([bad])


def test_an_answer_without_what_was_asked_for_is_no_answer(
    endpoint: Endpoint, folder: Path
) -> None:
    engine = _engine(_settings(endpoint), folder)
    for failure, words in (("none", "no prompt log-probs"), ("few", "4 of 5 log-probs")):
        endpoint.failing = [failure]
        with pytest.raises(ValueError, match=words):
            engine.capture(_requests(1))


def test_a_server_of_another_model_is_no_rows_fault(folder: Path) -> None:
    with serve_endpoint(vocabulary=1000) as other:
        engine = _engine(_settings(other), folder)
        with pytest.raises(ConfigError, match=r"has 100 ids, and the servers .* answer with id"):
            engine.capture(_requests(3))


def test_refused_before_work(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _settings(endpoint)

    def refused(words: str, capture: CaptureSettings = CAPTURE, length: int = 64) -> None:
        with pytest.raises(ConfigError) as caught:
            check_engine(settings, capture, length)
        assert words in str(caught.value), caught.value
        assert "\n" not in str(caught.value)

    refused("gives no 64 log-probs for each token of a prompt (it refuses: Requested prompt",
            CaptureSettings(top_k=64, temperatures=(1.0,)))  # fmt: skip
    refused("start it with --max-logprobs 64, or ask for fewer with --capture.top_k",
            CaptureSettings(top_k=64, temperatures=(1.0,)))  # fmt: skip
    endpoint.failing = ["none"]
    refused("it answers with no prompt log-probs")
    endpoint.failing = ["few"]
    refused("it answers with 4 of 5 log-probs a token")
    endpoint.failing = ["raw"]
    refused("what it calls log-probs sums to more than 1")
    for failure in (503, 429, "cut", "drop"):  # says nothing of what the server can do
        endpoint.failing = [failure]
        check_engine(settings, CAPTURE, 64)
        assert not endpoint.failing
    endpoint.failing = [503] * 3
    with pytest.raises(EngineStalled, match=r"does not answer \(503 no\); expected a server that"):
        check_engine(settings, CAPTURE, 64)
    refused("corpus.max_length: found 4096, expected at most 4095", length=4096)
    endpoint.key = "secret-of-a-test"
    refused("the key in the variable OPENAI_API_KEY is not set")
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-one")
    refused("the key in the variable OPENAI_API_KEY was refused")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-a-test")
    check_engine(settings, CAPTURE, 64)
    assert "Bearer secret-of-a-test" in endpoint.keys
    endpoint.kind = "other"
    refused("is no server of a known kind (it tells no version as vllm or sglang does)")


def test_servers_that_are_not_one_teacher(folder: Path) -> None:
    with serve_endpoint() as one, serve_endpoint(version="0.33.0") as two:
        with pytest.raises(ConfigError, match=r"vllm 0\.32\.0 serving big at .* and vllm 0\.33\.0"):
            engine_info(_settings(one, two))
        two.models = ("big", "small")
        with pytest.raises(ConfigError, match=r"serves big, small; expected teacher\.endpoint"):
            engine_info(_settings(two))
        assert "serving small" in engine_info(_settings(two, served_name="small")).engine_version
        with pytest.raises(ConfigError, match=r"not teacher\.endpoint\.served_name huge"):
            engine_info(_settings(one, served_name="huge"))
        one.down = True
        with pytest.raises(EngineStalled, match=r"does not answer \(503 starting"):
            engine_info(_settings(one))
    with pytest.raises(EngineStalled, match="does not answer"):
        engine_info(_settings(one))


@pytest.mark.parametrize(
    ("urls", "words"),
    [
        (["http://me:password@host"], "a key belongs into the variable"),
        (["http://host/v1?key=abc"], "a key belongs into the variable"),
        (["host:8000"], "expected addresses such as http"),
        (["http://a", "http://a"], "there twice"),
        ([], "found none with teacher.engine openai"),
    ],
)
def test_addresses_that_cannot_be(urls: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        TeacherSettings(engine="openai", endpoint={"urls": urls})
    if "password" in str(urls):
        assert "found an address" in str(caught.value)
    with pytest.raises(ValueError, match="not the key itself"):
        TeacherSettings(engine="openai", endpoint={"urls": ["http://a"], "key_variable": "sk-1x"})


def test_an_endpoint_serves_top_k_at_temperature_1() -> None:
    from pipeline.api.settings import TeacherRun

    teacher = {"engine": "openai", "endpoint": {"urls": ["http://a"]}}
    with pytest.raises(ValueError, match="servers know no other normaliser"):
        TeacherRun.model_validate({"teacher": teacher})
    with pytest.raises(ValueError, match="servers tell the largest entries alone"):
        TeacherRun.model_validate({"teacher": teacher, "capture": {"scheme": "threshold"}})
    one = {"temperatures": [1.0]}
    with pytest.raises(ValueError, match=r"expected generate\.writer beside it"):
        TeacherRun.model_validate(
            {"teacher": teacher, "capture": one, "generate": {"enabled": True}}
        )
    wanted = {"enabled": True, "writer": "small", "record_top_k": 4}
    with pytest.raises(ValueError, match="not ids asked for"):
        TeacherRun.model_validate({"teacher": teacher, "capture": one, "generate": wanted})
    TeacherRun.model_validate({"teacher": teacher, "capture": one})
    with pytest.raises(ValueError, match="expected them with openai alone"):
        TeacherSettings(endpoint={"urls": ["http://a"]})
