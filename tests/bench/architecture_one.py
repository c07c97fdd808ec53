"""One teacher captured on vLLM and on transformers, against dense logits of transformers.

The dense logits come from transformers' own forward pass, one sequence at a time: nothing padded,
chunked or packed. Runs in a process of its own, which vLLM's world needs.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import tempfile
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PRELOAD", "compare"]

PRELOAD = (
    "torch", "transformers", "vllm", "vllm.model_executor.models.registry",
    "vllm.v1.engine.llm_engine", "pipeline.teacher.engines.vllm",
    "pipeline.teacher.engines.transformers", __name__,
)  # fmt: skip
"""What a fork server imports once for all teachers."""
TOP_K, GRID = 20, (1.0, 2.0)
LENGTHS = (2, 3, 17, 64, 90, 100, 40, 9, 71)
"""396 tokens in steps of 128: long prefills are cut, short ones share a step."""
LONGEST = 120
STEP = 128


def compare(name: str, log: str, answers: Any) -> None:
    """Send the outcome of a teacher through `answers`, a connection; what is said goes to `log`.

    The outcome: `vllm` and `transformers`, the largest difference in log-probs of each engine;
    `others`, of vLLM in log Z, entropy and tail; `served`, by what class; `attention`; `same`,
    whether a second capture had the same bits; `why`, where vLLM cannot run it; `seconds`.
    """
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = _outcome(name, Path(folder))
    answers.send({**outcome, "seconds": time.monotonic() - started})


def _outcome(name: str, folder: Path) -> dict[str, Any]:
    import logging
    import traceback

    from pipeline.teacher.engines.base import CaptureRequest
    from tests.bench.architecture_teachers import FIRST_WORD, VOCAB, save_teacher

    logging.getLogger("transformers").setLevel(logging.ERROR)
    found = _inspect_here()
    _leave_pictures_out()
    save_teacher(name, folder)
    draw = np.random.default_rng(5)
    requests = [
        CaptureRequest(
            f"{number:032x}",
            draw.integers(FIRST_WORD, VOCAB, length).astype(np.int32),
            np.sort(draw.choice(length - 1, max(1, length // 2), replace=False)).astype(np.int64),
        )
        for number, length in enumerate(LENGTHS)
    ]
    logits = _dense(folder, requests)
    outcome: dict[str, Any] = {}
    columns, _ = _captured(folder, requests, "transformers")
    outcome["transformers"] = _differences(columns, requests, logits)[0]
    try:
        columns, told = _captured(folder, requests, "vllm")
    except Exception as error:  # whatever stops vLLM is the answer
        traceback.print_exc()
        return {**outcome, "why": _in_one_line(found[-1] if found else error)}
    largest, others = _differences(columns, requests, logits)
    return {**outcome, "vllm": largest, "others": others, **told}


def _inspect_here() -> list[Exception]:
    """Let vLLM look at model classes in this process, and return where it will put what it meets.

    It would start another process for each, to keep CUDA out of its own, and import itself there
    for 10 s; this process is one teacher's alone. Of what it meets there it says only to look.
    """
    from vllm.model_executor.models import registry

    met: list[Exception] = []

    def inspect(look: Any) -> Any:
        try:
            return look()
        except Exception as error:
            met.append(error)
            raise

    assert hasattr(registry, "_run_in_subprocess")
    registry._run_in_subprocess = inspect
    return met


class _NoPictures(MetaPathFinder, Loader):
    """Answers for torchvision, which has no place beside the CPU's torch, and does nothing."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> Any:
        from unittest.mock import MagicMock

        return MagicMock(
            name=spec.name, __spec__=spec, __path__=[], __name__=spec.name, __file__=spec.name
        )

    def exec_module(self, module: Any) -> None:
        """Leave it as it was made."""


def _leave_pictures_out() -> None:
    """Let vLLM import models that also see; the tiny ones are read as text."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_NoPictures())


def _in_one_line(error: BaseException) -> str:
    from pipeline.teacher.engines.vllm import _reason

    while error.__cause__ is not None:
        error = error.__cause__
    return _reason(error)


def _dense(folder: Path, requests: Any) -> list[NDArray[np.float64]]:
    """Return the logits [N, V] of the wanted rows of each request."""
    import torch
    import transformers

    # Where attention has no eager form, there is no other.
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = []
    with torch.inference_mode():
        for request in requests:
            ids_1L = torch.from_numpy(request.input_ids_L.astype(np.int64))[None]
            logits_LV = model(input_ids=ids_1L, use_cache=False).logits[0]
            found.append(logits_LV[torch.from_numpy(request.rows_N)].double().numpy())
    del model
    gc.collect()
    return found


def _captured(
    folder: Path, requests: Any, engine: str
) -> tuple[list[NDArray[np.float32]], dict[str, Any]]:
    from pipeline.teacher.engines.registry import open_engine
    from pipeline.teacher.settings import CaptureSettings, TeacherSettings
    from pipeline.teacher.sparsify.device import SparseScheme

    sees = "vision_config" in json.loads((folder / "config.json").read_text())
    settings = TeacherSettings(
        model=str(folder), engine=engine, kv_cache_gib=0.25, batch_tokens=STEP,  # type: ignore[arg-type]
        engine_options={"language_model_only": True} if sees and engine == "vllm" else {},
    )  # fmt: skip
    opened: Any = open_engine(
        settings, CaptureSettings(top_k=TOP_K, temperatures=GRID, head_rows=50),
        folder=folder, scheme=SparseScheme(TOP_K, GRID), max_length=LONGEST,
    )  # fmt: skip
    columns = opened.capture(requests)
    if engine == "transformers":
        opened.close()
        return columns, {}
    again = opened.capture(requests)
    config = opened._llm.llm_engine.vllm_config.model_config
    return columns, {
        "attention": opened.attention,
        "served": "transformers' code" if config.using_transformers_backend() else "its own",
        "same": all(np.array_equal(a, b) for a, b in zip(columns, again, strict=True)),
    }


def _differences(
    captured: list[NDArray[np.float32]], requests: Any, logits: list[NDArray[np.float64]]
) -> tuple[float, float]:
    """Return the largest differences in log-probs, and in log Z, entropies and tails.

    Log-probs: of the label token, of the entries by their ids, and of the entries in order against
    the dense distribution's own largest, so that a wrong id is one, too. NaN is infinite.
    """
    size = len(GRID)
    logprobs, others = [0.0], [0.0]
    for columns_NC, request, logits_NV in zip(captured, requests, logits, strict=True):
        dense = [_log_softmax(logits_NV / temperature) for temperature in GRID]
        label_N1 = request.input_ids_L[request.rows_N + 1][:, None].astype(np.int64)
        ids_NK = columns_NC[:, 2 + 2 * size : 2 + 2 * size + TOP_K].astype(np.int64)
        entries_NK = columns_NC[:, 2 + 2 * size + TOP_K :]
        largest_NK = -np.sort(-dense[0], axis=1)[:, :TOP_K]
        at_ids_NK = np.take_along_axis(dense[0], ids_NK, 1)
        log_z_NG = [_logsumexp(dense[0] / temperature) for temperature in GRID]
        entropy_NG = [-(np.exp(one) * one).sum(1) for one in dense]
        pairs = [
            (columns_NC[:, :1], np.take_along_axis(dense[0], label_N1, 1)),
            (entries_NK, at_ids_NK),
            (-np.sort(-entries_NK, axis=1), largest_NK),
        ]
        logprobs += [_largest(ours, theirs) for ours, theirs in pairs]
        others += [
            _largest(columns_NC[:, 1], 1 - np.exp(largest_NK).sum(1)),
            _largest(columns_NC[:, 2 : 2 + size], np.stack(log_z_NG, 1)),
            _largest(columns_NC[:, 2 + size : 2 + 2 * size], np.stack(entropy_NG, 1)),
        ]
    return max(logprobs), max(others)


def _largest(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    return float(np.nan_to_num(np.abs(ours - theirs), nan=np.inf).max())


def _logsumexp(x_NV: NDArray[np.float64]) -> NDArray[np.float64]:
    top_N1 = x_NV.max(1, keepdims=True)
    return np.asarray((top_N1 + np.log(np.exp(x_NV - top_N1).sum(1, keepdims=True)))[:, 0])


def _log_softmax(logits_NV: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(logits_NV - _logsumexp(logits_NV)[:, None])
