"""What servers answer, read by hand: every number at its place, and what lacks some refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.errors import EngineStalled
from pipeline.teacher.engines.endpoint.client import (
    Answer,
    EndpointClient,
    RequestRefused,
    _Account,
)
from pipeline.teacher.engines.endpoint.servers import SERVERS
from pipeline.teacher.settings import EndpointSettings

IDS = np.array([7, 3, 5], np.int32)
ROWS = np.array([0, 1], np.int64)
TOP = {1: [(9, -0.5), (3, -1.5)], 2: [(4, -0.25), (8, -2.0)]}
"""By token: the two likeliest in its place, with log p; 3 is one of them, 5 is not."""
OWN = {1: -1.5, 2: -4.0}


def _answer(kind: str) -> Any:
    if kind == "sglang":
        return {
            "meta_info": {
                "input_token_logprobs": [[None, 7, None]]
                + [[OWN[at], int(IDS[at]), None] for at in (1, 2)],
                "input_top_logprobs": [None]
                + [[[p, token, None] for token, p in TOP[at]] for at in (1, 2)],
            }
        }
    places: list[Any] = [None]
    for at in (1, 2):
        place = {str(token): {"logprob": p, "rank": n} for n, (token, p) in enumerate(TOP[at], 1)}
        place.setdefault(str(int(IDS[at])), {"logprob": OWN[at], "rank": 40})
        # Their order in the mapping is nobody's promise.
        places.append(dict(reversed(place.items())))
    return {"choices": [{"prompt_logprobs": places}]}


def _places(kind: str, answer: Any) -> Any:
    if kind == "sglang":
        return answer["meta_info"]["input_token_logprobs"]
    return answer["choices"][0]["prompt_logprobs"]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_every_number_at_its_place(kind: str) -> None:
    found = SERVERS[kind].read(_answer(kind), IDS, ROWS, 2)
    assert found.label_N.tolist() == [-1.5, -4.0]
    assert found.ids_NK.tolist() == [[9, 3], [4, 8]]
    assert found.logprobs_NK.tolist() == [[-0.5, -1.5], [-0.25, -2.0]]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_an_answer_about_fewer_tokens_is_refused(kind: str) -> None:
    """Even where all that is asked for is there: it is about another prompt."""
    answer = _answer(kind)
    _places(kind, answer).pop()
    with pytest.raises(ValueError, match="of 2 tokens, not of 3"):
        SERVERS[kind].read(answer, IDS, ROWS[:1], 2)


def test_the_token_itself_is_none_of_the_likeliest() -> None:
    answer = _answer("vllm")
    del _places("vllm", answer)[2]["8"]
    with pytest.raises(ValueError, match="1 of 2 log-probs"):
        SERVERS["vllm"].read(answer, IDS, ROWS, 2)


def test_log_probs_of_another_token_are_refused() -> None:
    answer = _answer("sglang")
    _places("sglang", answer)[2][1] = 6
    with pytest.raises(ValueError, match="another token than 2"):
        SERVERS["sglang"].read(answer, IDS, ROWS, 2)


def test_a_request_fails_for_itself_only_while_a_harmless_one_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    settings = EndpointSettings(urls=("http://host:1",), tries=3, patience_s=100.0)
    client = EndpointClient(settings, clock=lambda: now[0])
    client.harmless = "/v1/completions", {}
    server, account = client._state.servers[0], _Account(0.0)

    def gone(*_: Any) -> Answer:
        raise ConnectionError("no route")

    monkeypatch.setattr(client, "send", gone)
    for _ in range(20):
        client._judge(server, account, busy=False)
    now[0] = 101.0
    with pytest.raises(EngineStalled, match="for 100 s"):
        client._judge(server, account, busy=False)
    monkeypatch.setattr(client, "send", lambda *_: Answer(200, {}))
    with pytest.raises(RequestRefused, match="22 attempts failed"):
        client._judge(server, account, busy=False)
    # A server that has too much to do says nothing of a row.
    fresh = _Account(now[0])
    for _ in range(20):
        client._judge(server, fresh, busy=True)
