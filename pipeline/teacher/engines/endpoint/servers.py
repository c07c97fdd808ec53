"""What vLLM's and SGLang's servers are asked for a prompt's log-probs, and how they answer.

Legend: L tokens, N rows whose distribution over the next token is wanted, K entries of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["SERVERS", "PromptLogprobs", "ServerKind"]

_Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """The answer for N rows."""

    label_N: NDArray[np.float32]
    """log p of the token that follows."""
    ids_NK: NDArray[np.int32]
    """The K most probable tokens, the first the most probable one."""
    logprobs_NK: NDArray[np.float32]


class ServerKind(Protocol):
    """How one kind of server is spoken to."""

    name: str
    version_path: str
    """Answers with a member `version`."""
    path: str

    def body(self, model: str, ids: Sequence[int], top_k: int) -> dict[str, Any]:
        """Return the request for a prompt's log-probs."""
        ...

    def read(self, answer: Any, ids_L: _Ids, rows_N: NDArray[np.int64], k: int) -> PromptLogprobs:
        """Return the log-probs of some rows.

        Raises:
            ValueError: the answer has none, or fewer than asked, with how many.
        """
        ...


class _Vllm:
    name = "vllm"
    version_path = "/version"
    path = "/v1/completions"

    def body(self, model: str, ids: Sequence[int], top_k: int) -> dict[str, Any]:
        return {
            "model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0,
            "prompt_logprobs": top_k, "add_special_tokens": False,
        }  # fmt: skip

    def read(self, answer: Any, ids_L: _Ids, rows_N: NDArray[np.int64], k: int) -> PromptLogprobs:
        """Each place has a mapping of ids to log-prob and rank: the K largest and the token."""
        places = _member(answer, "choices", 0, "prompt_logprobs")
        _check_length(places, ids_L)
        label_N, ids_NK, logprobs_NK = _empty(rows_N.size, k)
        for n, row in enumerate(rows_N.tolist()):
            place = places[row + 1]
            if not isinstance(place, Mapping):
                raise ValueError(f"no log-probs of token {row + 1}")
            label = place.get(str(int(ids_L[row + 1])))
            if label is None:
                raise ValueError(f"the log-prob of token {row + 1} itself is missing")
            label_N[n] = label["logprob"]
            ranked = [(v["rank"], int(i), v["logprob"]) for i, v in place.items()]
            ranked = sorted(item for item in ranked if item[0] is not None and item[0] <= k)
            _fill(ids_NK, logprobs_NK, n, [(i, p) for _, i, p in ranked], k)
        return PromptLogprobs(label_N, ids_NK, logprobs_NK)


class _Sglang:
    name = "sglang"
    version_path = "/get_server_info"
    path = "/generate"

    def body(self, model: str, ids: Sequence[int], top_k: int) -> dict[str, Any]:
        return {
            "input_ids": list(ids), "return_logprob": True, "logprob_start_len": 0,
            "top_logprobs_num": top_k,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        }  # fmt: skip

    def read(self, answer: Any, ids_L: _Ids, rows_N: NDArray[np.int64], k: int) -> PromptLogprobs:
        """Each place has [log-prob, id, text] of the token, and a list of the same of the top."""
        own = _member(answer, "meta_info", "input_token_logprobs")
        top = _member(answer, "meta_info", "input_top_logprobs")
        _check_length(own, ids_L)
        _check_length(top, ids_L)
        label_N, ids_NK, logprobs_NK = _empty(rows_N.size, k)
        for n, row in enumerate(rows_N.tolist()):
            value, token, *_ = own[row + 1]
            if int(token) != int(ids_L[row + 1]) or value is None:
                raise ValueError(f"log-probs of another token than {row + 1}")
            label_N[n] = value
            _fill(ids_NK, logprobs_NK, n, [(int(i), p) for p, i, *_ in top[row + 1] or ()], k)
        return PromptLogprobs(label_N, ids_NK, logprobs_NK)


SERVERS: dict[str, ServerKind] = {"vllm": _Vllm(), "sglang": _Sglang()}


def _member(answer: Any, *path: str | int) -> Any:
    found = answer
    for name in path:
        try:
            found = found[name]
        except (KeyError, IndexError, TypeError):
            found = None
    if found is None:
        raise ValueError("no prompt log-probs")
    return found


def _check_length(places: Any, ids_L: _Ids) -> None:
    if not isinstance(places, list) or len(places) != ids_L.size:
        found = len(places) if isinstance(places, list) else "no list"
        raise ValueError(f"prompt log-probs of {found} tokens, not of {ids_L.size}")


def _empty(rows: int, k: int) -> tuple[NDArray[np.float32], _Ids, NDArray[np.float32]]:
    return (
        np.empty(rows, np.float32),
        np.empty((rows, k), np.int32),
        np.empty((rows, k), np.float32),
    )


def _fill(
    ids_NK: _Ids,
    logprobs_NK: NDArray[np.float32],
    n: int,
    entries: Sequence[tuple[int, float]],
    k: int,
) -> None:
    if len(entries) < k:
        raise ValueError(f"{len(entries)} of {k} log-probs a token")
    ids_NK[n] = [token for token, _ in entries[:k]]
    logprobs_NK[n] = [value for _, value in entries[:k]]
