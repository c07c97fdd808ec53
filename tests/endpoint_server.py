"""A server of prompt log-probs on this machine that fails in every way it is told to."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.json_server import JsonHandler, serving

__all__ = ["Endpoint", "dense_logprobs", "serve_endpoint"]


@dataclass
class Endpoint:
    """What it serves, and what goes wrong; each failure of a list is used up by one request."""

    url: str = ""
    kind: str = "vllm"
    version: str = "0.32.0"
    models: tuple[str, ...] = ("big",)
    vocabulary: int = 100
    max_logprobs: int = 20
    max_model_len: int | None = 4096
    key: str = ""
    failing: list[Any] = field(default_factory=list)
    """For the next requests: a status, `cut`, `hang`, `none`, `few`, `raw`, `drop`."""
    broken_for: int = -1
    """A token with which every request fails by 500."""
    down: bool = False
    starting: int = 0
    """Requests of any kind that are refused before it serves."""
    asked: int = 0
    at_once: int = 0
    most_at_once: int = 0
    keys: set[str] = field(default_factory=set)


def dense_logprobs(prefix: Sequence[int], vocabulary: int) -> np.ndarray:
    """Return the distribution of the token after a prefix, the same for the same prefix."""
    seed = int.from_bytes(hashlib.sha256(str(list(prefix)).encode()).digest()[:4], "little")
    logits = np.random.default_rng(seed).normal(0, 2, vocabulary)
    return logits - np.log(np.exp(logits).sum())


@contextmanager
def serve_endpoint(**options: Any) -> Iterator[Endpoint]:
    """Serve on a free port."""
    endpoint = Endpoint(**options)
    lock = threading.Lock()

    class Handler(JsonHandler):
        def _answer(self, data: Any, code: int = 200, *, cut: bool = False) -> None:
            body = json.dumps(data).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            if code == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self.close_connection = True

        def _may(self) -> bool:
            given = self.headers.get("Authorization", "")
            endpoint.keys.add(given)
            if endpoint.down or endpoint.starting:
                endpoint.starting -= bool(endpoint.starting)
                self._answer({"message": "starting"}, 503)
                return False
            if endpoint.key and given != f"Bearer {endpoint.key}":
                self._answer({"error": {"message": "Unauthorized"}}, 401)
                return False
            return True

        def do_GET(self) -> None:
            if not self._may():
                return None
            if self.path == "/v1/models":
                length = endpoint.max_model_len
                listed = [{"id": m, "root": m, "max_model_len": length} for m in endpoint.models]
                return self._answer({"data": listed})
            paths = {"vllm": "/version", "sglang": "/get_server_info"}
            if self.path == paths.get(endpoint.kind):
                return self._answer({"version": endpoint.version})
            return self._answer({"detail": "Not Found"}, 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._may():
                return
            with lock:
                endpoint.asked += 1
                endpoint.at_once += 1
                endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                failure = endpoint.failing.pop(0) if endpoint.failing else None
            try:
                self._reply(body, failure)
            finally:
                with lock:
                    endpoint.at_once -= 1

        def _reply(self, body: Any, failure: Any) -> None:
            ids = body.get("prompt") or body.get("input_ids")
            k = body.get("prompt_logprobs") or body.get("top_logprobs_num") or 0
            if isinstance(failure, int):
                return self._answer({"error": {"message": "no"}}, failure)
            if failure == "drop":
                self.close_connection = True
                return None
            if failure == "hang":
                time.sleep(1.0)
            if endpoint.broken_for in ids:
                return self._answer({"error": {"message": "CUDA error"}}, 500)
            if k > endpoint.max_logprobs:
                text = f"Requested prompt logprobs of {k}, greater than max {endpoint.max_logprobs}"
                return self._answer({"error": {"message": text}}, 400)
            if failure == "none":
                return self._answer({"choices": [{"text": "x"}], "meta_info": {}})
            places = [self._place(ids, at, k - (failure == "few")) for at in range(len(ids))]
            if failure == "raw":
                places = [[(i, p + 5) for i, p in place] for place in places]
            return self._answer(self._form(ids, places, k), cut=failure == "cut")

        def _place(self, ids: list[int], at: int, k: int) -> list[tuple[int, float]]:
            """Return the K largest, then the token itself."""
            if at == 0:
                return []
            log_p = dense_logprobs(ids[:at], endpoint.vocabulary)
            top = np.argsort(-log_p)[:k].tolist()
            return [(i, float(log_p[i])) for i in [*top, ids[at]]]

        def _form(self, ids: list[int], places: list[list[tuple[int, float]]], k: int) -> Any:
            if endpoint.kind == "sglang":
                own = [[p[-1][1] if p else None, i, None] for i, p in zip(ids, places, strict=True)]
                top = [[[v, i, None] for i, v in p[:-1]] if p else None for p in places]
                meta = {"input_token_logprobs": own, "input_top_logprobs": top}
                return {"text": "x", "meta_info": meta}
            listed: list[Any] = []
            for place in places:
                ranked: dict[str, Any] = {}
                for rank, (token, value) in enumerate(place):
                    ranked.setdefault(str(token), {"logprob": value, "rank": rank + 1})
                    if rank == len(place) - 1 and ranked[str(token)]["rank"] == rank + 1:
                        ranked[str(token)]["rank"] = k + 7  # somewhere below the largest
                listed.append(ranked or None)
            return {"choices": [{"text": "x", "prompt_logprobs": listed}]}

    with serving(Handler) as endpoint.url:
        yield endpoint
