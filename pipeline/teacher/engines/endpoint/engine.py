"""The teacher as an engine: each sample one request, so many at a time, answers as columns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.models.resolve import read_model_config, text_config
from pipeline.teacher.engines.base import CaptureRequest
from pipeline.teacher.engines.endpoint.client import EndpointClient
from pipeline.teacher.engines.endpoint.serving import PROBE, find_serving
from pipeline.teacher.engines.top_k_columns import top_k_columns
from pipeline.teacher.settings import TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme

__all__ = ["EndpointEngine"]

_log = logging.getLogger(__name__)
_BEAT_S = 1.0
"""How often progress is told while requests are under way."""


class EndpointEngine:
    """Prompt log-probs over HTTP.

    A server forms its batches from whatever requests it has, so the last bits of a distribution
    differ from one call to the next: the promise of the same bytes for the same configuration is
    not kept by this engine, and the log says so.
    """

    attention = "the server's"

    def __init__(self, settings: TeacherSettings, *, folder: Path, scheme: SparseScheme) -> None:
        """Ask the servers what they are.

        Raises:
            ConfigError: they are not what is needed.
            EngineStalled: one does not answer.
        """
        self._scheme = scheme
        self._client = EndpointClient(settings.endpoint)
        self._serving = find_serving(self._client, settings.endpoint)
        kind = self._serving.kind
        self._client.harmless = kind.path, kind.body(self._serving.model, PROBE, scheme.top_k)
        self._at_once = settings.endpoint.requests * len(self._client.urls)
        self.vocab_size = int(text_config(read_model_config(folder))["vocab_size"])
        self._answered: dict[str, NDArray[np.float32]] = {}
        """Of a call that failed: what was answered is not asked again."""
        _log.warning(
            "the teacher is behind an endpoint (%s): its answers depend on what else the server "
            "computes, so the same configuration need not give the same bytes again",
            self._serving.words,
        )

    def capture(
        self,
        requests: Sequence[CaptureRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Return the columns of each request, in order."""
        report = on_tokens or (lambda tokens: None)
        self._client.go_on()
        pool = ThreadPoolExecutor(self._at_once, thread_name_prefix="endpoint")
        open_: dict[Future[NDArray[np.float32]], CaptureRequest] = {}
        try:
            for request in requests:
                if request.row_id in self._answered:
                    report(int(request.input_ids_L.size))
                else:
                    open_[pool.submit(self._ask, request)] = request
            while open_:
                done, _ = wait(open_, timeout=_BEAT_S, return_when=FIRST_COMPLETED)
                for future in done:
                    request = open_.pop(future)
                    self._answered[request.row_id] = future.result()
                    report(int(request.input_ids_L.size))
        except BaseException:
            self._client.stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for future, request in open_.items():  # what ended beside the one that failed
                if future.done() and not future.cancelled() and future.exception() is None:
                    self._answered[request.row_id] = future.result()
        # Answers to other calls stay: what follows a failure asks for single rows in between.
        answers = [self._answered[request.row_id] for request in requests]
        for request in requests:
            self._answered.pop(request.row_id, None)
        return answers

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(self, request: CaptureRequest) -> NDArray[np.float32]:
        kind, top_k = self._serving.kind, self._scheme.top_k
        body = kind.body(self._serving.model, request.input_ids_L.tolist(), top_k)
        answer = self._client.ask(kind.path, body)
        found = kind.read(answer, request.input_ids_L, request.rows_N, top_k)
        highest = int(found.ids_NK.max(initial=0))
        if highest >= self.vocab_size:
            raise ConfigError(
                f"teacher.model: its vocabulary has {self.vocab_size} ids, and the servers of "
                f"teacher.endpoint ({self._serving.words}) answer with id {highest}",
                expected="one model: samples are tokenised by teacher.model",
                do="name the model that the servers have loaded",
            )
        return top_k_columns(found.label_N, found.ids_NK, found.logprobs_NK)
