"""What a call to the hub is tried again for, how long it waits, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

from pipeline.storage import hub
from pipeline.storage.hub import retried


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the seconds that would have been slept."""
    found: list[float] = []
    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=found.append))
    return found


def _answer(status: int, **headers: str) -> HfHubHTTPError:
    request = httpx.Request("GET", "http://hub.test/api")
    response = httpx.Response(status, headers=headers, request=request)
    return HfHubHTTPError(f"{status} of the hub", response=response)


def _failing(*errors: Exception) -> tuple[Callable[[], str], list[int]]:
    """Return a call that raises each error once before it returns, and its attempts."""
    attempts: list[int] = []

    def call() -> str:
        attempts.append(1)
        if len(attempts) <= len(errors):
            raise errors[len(attempts) - 1]
        return "there"

    return call, attempts


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_an_answer_that_passes_is_waited_for(status: int, waits: list[float]) -> None:
    call, attempts = _failing(_answer(status), _answer(status))
    assert retried(call, "me/cache") == "there"
    assert len(attempts) == 3
    assert waits == [2, 4]


def test_a_connection_that_fails_is_tried_again(waits: list[float]) -> None:
    call, attempts = _failing(httpx.ConnectError("refused"), ConnectionResetError("reset"))
    assert retried(call, "me/cache") == "there"
    assert len(attempts) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409])
def test_an_answer_that_stays_is_told_at_once(status: int, waits: list[float]) -> None:
    call, attempts = _failing(_answer(status))
    with pytest.raises(HfHubHTTPError):
        retried(call, "me/cache")
    assert (len(attempts), waits) == (1, [])


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (OfflineModeIsEnabled("HF_HUB_OFFLINE=1"), ()),
        (EntryNotFoundError("no such file"), (EntryNotFoundError,)),
    ],
)
def test_what_is_an_answer_by_itself_is_not_tried_again(
    error: Exception, final: Any, waits: list[float]
) -> None:
    call, attempts = _failing(error)
    with pytest.raises(type(error)):
        retried(call, "me/cache", final=final)
    assert (len(attempts), waits) == (1, [])


def test_the_hubs_own_wait_is_honoured(waits: list[float]) -> None:
    call, _ = _failing(_answer(429, **{"Retry-After": "7"}))
    assert retried(call, "me/cache") == "there"
    assert waits == [7]


def test_five_attempts_and_no_more(waits: list[float]) -> None:
    call, attempts = _failing(*[_answer(503)] * 9)
    with pytest.raises(HfHubHTTPError):
        retried(call, "me/cache")
    assert len(attempts) == 5
    assert waits == [2, 4, 8, 16]
