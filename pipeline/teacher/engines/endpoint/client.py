"""Requests to several servers of one teacher: spread, timed out, retried with growing pauses."""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import ConfigError, EngineStalled
from pipeline.storage.faults import status_passes
from pipeline.teacher.settings import EndpointSettings

__all__ = ["Answer", "EndpointClient", "RequestRefused", "Stopped"]

_log = logging.getLogger(__name__)

_FIRST_REST_S = 0.5
_LONGEST_REST_S = 60.0
_CONNECT_S = 10.0
"""HTTP answers that a later attempt may not get; so are all from 500."""
_BUSY = (429, 503)
_OF_THE_REQUEST = (400, 413, 422)
"""Answers that are about this request, not about the server."""
_LONGEST_REASON = 300


class RequestRefused(Exception):
    """The server rejects this request, and would again."""


class Stopped(Exception):
    """Another request of the same call has failed; this one is given up."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said: its status and, where there is one, the JSON of its body."""

    status: int
    data: Any
    reason: str = ""
    """Of an answer that is no success, in the server's words."""
    retry_after_s: float = 0.0


@dataclass(slots=True)
class _Server:
    url: str
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    rests_until: float = 0.0
    last_error: str = ""


@dataclass(slots=True)
class _Account:
    """The failures of one request."""

    since: float
    failures: int = 0
    successes_before: int = 0


@dataclass(slots=True)
class _State:
    servers: list[_Server]
    lock: threading.Lock = field(default_factory=threading.Lock)
    successes: int = 0


class EndpointClient:
    """Sends requests to whichever server has the fewest under way; safe from several threads."""

    def __init__(
        self, settings: EndpointSettings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Open no connection yet; the key is read from the environment.

        Raises:
            ConfigError: no server is named, or urllib3 is not installed.
        """
        try:
            import urllib3
        except ImportError:
            raise ConfigError(
                "teacher.engine is openai, but the package urllib3 is not installed here",
                expected="it, as in stage one's environment",
            ) from None
        if not settings.urls:
            raise ConfigError(
                "teacher.endpoint.urls: found none with teacher.engine openai",
                expected="the servers' addresses, such as [http://host:8000]",
            )
        self._settings = settings
        self._clock = clock
        self._state = _State([_Server(_root(url)) for url in settings.urls])
        self._stop = threading.Event()
        self.harmless: tuple[str, Mapping[str, Any]] | None = None
        """Path and body of a request that tells a bad row from a bad server."""
        self._http = urllib3.PoolManager(
            num_pools=2 * len(settings.urls),
            maxsize=settings.requests,
            retries=False,
            timeout=urllib3.Timeout(connect=_CONNECT_S, read=settings.timeout_s),
        )

    @property
    def urls(self) -> list[str]:
        """The servers' addresses, without `/v1`."""
        return [server.url for server in self._state.servers]

    def stop(self) -> None:
        """Give up what is under way, soon: no request waits or begins another attempt."""
        self._stop.set()

    def go_on(self) -> None:
        """Take requests again."""
        self._stop.clear()

    def close(self) -> None:
        """Close all connections."""
        self._http.clear()

    def send(self, method: str, url: str, body: Any = None) -> Answer:
        """Send one request once.

        Raises:
            OSError: no answer, or one that is cut off.
        """
        import urllib3

        headers = {"Accept": "application/json"}
        if key := os.environ.get(self._settings.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        raw = None
        if body is not None:
            raw, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        try:
            # No redirects: the key is for this address alone.
            found = self._http.request(method, url, body=raw, headers=headers, redirect=False)
            status, content = int(found.status), found.data
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionError(_short(error)) from None
        try:
            data = json.loads(content)
        except ValueError:
            if status == 200:
                raise ConnectionError("the answer is no JSON, or is cut off") from None
            data = None
        if status == 200:
            return Answer(status, data)
        return Answer(status, data, _reason(data, content), _seconds(found.headers))

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON of a server's answer to a POST, from whichever server gives one.

        A server that fails rests, twice as long each time in a row, while the others work.

        Raises:
            RequestRefused: a server rejects the request, or fails for it again and again while a
                harmless one is answered.
            ConfigError: the key is refused, or there is nothing at this path.
            EngineStalled: no server has answered anything for `patience_s`.
            Stopped: `stop` was called.
        """
        account = _Account(self._clock(), successes_before=self._state.successes)
        while True:
            server = self._take()
            busy = False
            try:
                answer = self.send("POST", server.url + path, body)
            except OSError as error:
                self._give_back(server, failed=str(error))
            else:
                if answer.status == 200:
                    self._give_back(server)
                    return answer.data
                passing = status_passes(answer.status)
                busy = answer.status in _BUSY
                self._give_back(
                    server,
                    failed=f"{answer.status} {answer.reason}" if passing else "",
                    at_least=answer.retry_after_s,
                )
                if not passing:
                    raise refusal(server.url + path, answer, self._settings)
            self._judge(server, account, busy=busy)

    def _judge(self, server: _Server, account: _Account, *, busy: bool) -> None:
        """Give a request up whose failures are its own, or all servers after a long silence."""
        account.failures += not busy  # a server that has too much to do says nothing of a row
        state = self._state
        # That others were answered says nothing of now: the server may have gone since.
        if account.failures >= self._settings.tries and self._is_alive(server):
            raise RequestRefused(
                f"{account.failures} attempts failed while a harmless request is answered "
                f"({server.last_error})"
            )
        if state.successes > account.successes_before:
            account.successes_before, account.since = state.successes, self._clock()
        elif self._clock() - account.since > self._settings.patience_s:
            said = "; ".join(f"{s.url}: {s.last_error or 'not asked'}" for s in state.servers)
            raise EngineStalled(
                f"no server of the teacher has answered for {self._settings.patience_s:g} s "
                f"({said})",
                expected="at least one that answers",
                do="start it again, then run the same command; it goes on where it stopped",
            )

    def _is_alive(self, server: _Server) -> bool:
        """Whether a server answers a request that is known to be harmless."""
        if self.harmless is None:
            return False
        path, body = self.harmless
        try:
            return self.send("POST", server.url + path, body).status == 200
        except OSError:
            return False

    def _take(self) -> _Server:
        """Return the server with the fewest requests of those that do not rest; wait for one."""
        while True:
            if self._stop.is_set():
                raise Stopped
            with self._state.lock:
                now = self._clock()
                awake = [s for s in self._state.servers if s.rests_until <= now]
                if awake:
                    server = min(awake, key=lambda s: (s.in_flight, s.failures))
                    server.in_flight += 1
                    return server
                wait = min(s.rests_until for s in self._state.servers) - now
            self._stop.wait(max(wait, 0.001))

    def _give_back(self, server: _Server, *, failed: str = "", at_least: float = 0.0) -> None:
        with self._state.lock:
            server.in_flight -= 1
            if not failed:
                server.failures = 0
                self._state.successes += 1
                return
            server.last_error = failed
            if server.rests_until > self._clock():
                return  # of several that failed together one counts
            rest = min(_FIRST_REST_S * 2.0 ** min(server.failures, 20), _LONGEST_REST_S)
            rest = max(rest * random.uniform(0.5, 1.0), min(at_least, _LONGEST_REST_S))
            server.failures += 1
            server.rests_until = self._clock() + rest
        _log.warning("%s rests for %.1f s: %s", server.url, rest, failed)


def refusal(url: str, answer: Answer, settings: EndpointSettings) -> Exception:
    """Return what an answer means that another attempt would not change."""
    if answer.status in _OF_THE_REQUEST:
        return RequestRefused(f"{answer.status} {answer.reason}")
    if answer.status in (401, 403):
        key = settings.key_variable
        there = "was refused" if os.environ.get(key) else "is not set"
        return ConfigError(
            f"{url}: {answer.status} {answer.reason}: the key in the variable {key} {there}",
            expected=f"the server's key in {key}, or teacher.endpoint.key_variable to name another",
        )
    return ConfigError(
        f"{url}: {answer.status} {answer.reason}",
        expected="the address of a vLLM or SGLang server",
        do="correct teacher.endpoint.urls",
    )


def _root(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def _reason(data: Any, content: bytes) -> str:
    """Return a server's own words, which each of them puts elsewhere."""
    for path in (("error", "message"), ("message",), ("detail",), ("error",)):
        found = data
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, str):
            return _cut(found)
    return _cut(content.decode("utf-8", "replace"))


def _seconds(headers: Any) -> float:
    text = str(headers.get("Retry-After", ""))
    return float(text) if text.isdecimal() else 0.0


def _short(error: Exception) -> str:
    name = type(error).__name__
    if name.endswith("TimeoutError"):
        return "no answer in time"
    return _cut(f"{name}: {error}")


def _cut(text: str) -> str:
    return " ".join(text.split())[:_LONGEST_REASON]
