"""What the servers are: kind, version, model; all the same, and able to answer what is asked."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, EngineStalled, Mistakes
from pipeline.storage.faults import status_passes
from pipeline.teacher.engines.base import EngineInfo
from pipeline.teacher.engines.endpoint.client import (
    Answer,
    EndpointClient,
    RequestRefused,
    refusal,
)
from pipeline.teacher.engines.endpoint.servers import SERVERS, ServerKind
from pipeline.teacher.settings import CaptureSettings, EndpointSettings, TeacherSettings

__all__ = ["PROBE", "Serving", "check_endpoint", "endpoint_info", "find_serving"]

_TRIES = 3
_PAUSE_S = 1.0
PROBE = (1, 2, 3)
"""Ids that every vocabulary has."""
_MOST_MASS = 1.01


@dataclass(frozen=True, slots=True)
class Serving:
    """What every server of a teacher is."""

    kind: ServerKind
    version: str
    model: str
    """By the name that requests use."""
    root: str
    """What the server has loaded under it."""
    max_length: int | None
    """Tokens that a request may have, the generated one among them; None where not told."""

    @property
    def words(self) -> str:
        """For the cache's identity."""
        loaded = f" ({self.root})" if self.root not in ("", self.model) else ""
        return f"{self.kind.name} {self.version} serving {self.model}{loaded}"


def endpoint_info(settings: TeacherSettings) -> EngineInfo:
    """Return the engine's identity: which servers, and which model they have loaded.

    Raises:
        ConfigError: a server is none of these, or they differ, with all that is wrong.
        EngineStalled: a server does not answer.
    """
    client = EndpointClient(settings.endpoint)
    try:
        serving = find_serving(client, settings.endpoint)
    finally:
        client.close()
    return EngineInfo(
        engine="openai", engine_version=serving.words, dtype="the server's", device="a server"
    )


def check_endpoint(
    settings: TeacherSettings, capture: CaptureSettings, max_length: int | None
) -> None:
    """Ask each server for the log-probs of a few tokens, before anything else is done.

    Args:
        settings: the servers.
        capture: how many entries a position are asked for.
        max_length: tokens of the longest sample; None where it is not known.

    Raises:
        ConfigError: a server gives no prompt log-probs, or fewer than asked; with all mistakes.
        EngineStalled: a server does not answer.
    """
    client = EndpointClient(settings.endpoint)
    mistakes = Mistakes()
    try:
        serving = find_serving(client, settings.endpoint)
        most = serving.max_length
        if most is not None and max_length is not None and most < max_length + 1:
            mistakes.add(
                f"corpus.max_length: found {max_length}, expected at most {most - 1}: the servers "
                f"of teacher.endpoint take {most} tokens, one of them generated"
            )
        for url in client.urls:
            with mistakes.collected():
                _probe(client, url, serving, settings.endpoint, capture.top_k)
    finally:
        client.close()
    mistakes.raise_any()


def find_serving(client: EndpointClient, settings: EndpointSettings) -> Serving:
    """Return what all servers are.

    Raises:
        ConfigError: one is no server of a known kind, lacks the model, or differs from the first.
        EngineStalled: one does not answer.
    """
    mistakes = Mistakes()
    found: list[tuple[str, Serving]] = []
    for url in client.urls:
        with mistakes.collected():
            found.append((url, _serving(client, url, settings)))
    mistakes.raise_any()
    url, first = found[0]
    for other, serving in found[1:]:
        if serving.words != first.words:
            mistakes.add(
                f"teacher.endpoint.urls: found {first.words} at {url} and {serving.words} at "
                f"{other}, expected one model by one version everywhere"
            )
    mistakes.raise_any()
    return first


def _serving(client: EndpointClient, url: str, settings: EndpointSettings) -> Serving:
    models = _get(client, url, "/v1/models", settings)
    listed = models.get("data") if isinstance(models, dict) else None
    named = {str(item["id"]): item for item in listed or () if isinstance(item, dict)}
    if not named:
        raise _foreign(url, "it lists no model")
    if settings.served_name is None and len(named) > 1:
        raise ConfigError(
            f"{url}: serves {', '.join(named)}",
            expected="teacher.endpoint.served_name to name one of them",
        )
    name = settings.served_name or next(iter(named))
    if name not in named:
        raise ConfigError(
            f"{url}: serves {', '.join(named)}, not teacher.endpoint.served_name {name}",
            do="correct the name",
        )
    kinds = [settings.server] if settings.server != "auto" else list(SERVERS)
    for kind in kinds:
        server = SERVERS[kind]
        about = _get(client, url, server.version_path, settings, missing=True)
        version = about.get("version") if isinstance(about, dict) else None
        if isinstance(version, str):
            length = named[name].get("max_model_len")
            return Serving(
                server, version, name, str(named[name].get("root") or name),
                length if isinstance(length, int) else None,
            )  # fmt: skip
    raise _foreign(url, f"it tells no version as {' or '.join(kinds)} does")


def _foreign(url: str, why: str) -> ConfigError:
    return ConfigError(
        f"{url}: is no server of a known kind ({why})",
        expected="vLLM's or SGLang's: other endpoints give no log-probs of a prompt",
        do="correct teacher.endpoint.urls",
    )


def _get(
    client: EndpointClient,
    url: str,
    path: str,
    settings: EndpointSettings,
    *,
    missing: bool = False,
) -> Any:
    """Return the JSON at a path; None where there is nothing and that is no mistake."""
    answer = _answered(client, "GET", url, path)
    if answer.status == 200:
        return answer.data
    if answer.status in (404, 405) and missing:
        return None
    raise refusal(url + path, answer, settings)


def _answered(client: EndpointClient, method: str, url: str, path: str, body: Any = None) -> Answer:
    """Return an answer that another attempt would not change; what passes is tried again.

    Raises:
        EngineStalled: none of several attempts brought one.
    """
    error = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_S)
        try:
            answer = client.send(method, url + path, body)
        except OSError as failed:
            error = str(failed)
            continue
        if not status_passes(answer.status):
            return answer
        error = f"{answer.status} {answer.reason}"
    raise EngineStalled(
        f"{url}: does not answer ({error})",
        expected="a server that runs",
        do="start it, or correct teacher.endpoint.urls, then run the same command again",
    )


def _probe(
    client: EndpointClient, url: str, serving: Serving, settings: EndpointSettings, top_k: int
) -> None:
    body = serving.kind.body(serving.model, PROBE, top_k)
    ids_L = np.array(PROBE, np.int32)
    answer = _answered(client, "POST", url, serving.kind.path, body)
    if answer.status != 200:
        refused = refusal(url + serving.kind.path, answer, settings)
        if isinstance(refused, RequestRefused):
            raise _too_few(url, f"it refuses: {answer.reason}", top_k)
        raise refused
    try:
        found = serving.kind.read(answer.data, ids_L, np.arange(ids_L.size - 1), top_k)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _too_few(url, f"it answers with {error}", top_k) from None
    if np.exp(found.logprobs_NK.astype(np.float64)).sum(1).max() > _MOST_MASS:
        raise ConfigError(
            f"{url}: what it calls log-probs sums to more than 1",
            expected="log-probs: vLLM's server with --logprobs-mode raw_logprobs",
        )


def _too_few(url: str, why: str, top_k: int) -> ConfigError:
    return ConfigError(
        f"{url}: gives no {top_k} log-probs for each token of a prompt ({why})",
        expected="a server that does: vLLM's takes --max-logprobs, 20 where it is not said",
        do=f"start it with --max-logprobs {top_k}, or ask for fewer with --capture.top_k",
    )
