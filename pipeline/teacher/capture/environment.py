"""What a teacher runs on beside its settings: recorded in the cache, compared by later workers.

The identity decides the bytes on one kind of machine. Other kernels (another GPU, another torch)
round otherwise in the last bits: such workers may share a cache, which then holds targets of both,
and are told so. What is chosen rather than found is refused.
"""

from __future__ import annotations

import json
import logging
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.cache.layout.names import ENVIRONMENT
from pipeline.errors import CacheError
from pipeline.observe.hardware import device_name
from pipeline.storage import Store
from pipeline.teacher.engines.base import Engine, Teacher

__all__ = ["agree_on_environment", "describe_environment"]

_log = logging.getLogger(__name__)

_MUST_AGREE = ("attention_backend", "batch_invariant")
"""Chosen by settings or variables, and never the same bytes."""


def describe_environment(teacher: Teacher, engine: Engine) -> dict[str, Any]:
    """Return what the last bits of a loaded teacher's logits may depend on, JSON-able."""
    if teacher.settings.engine == "openai":
        # What the servers run on they do not tell; their version is in the identity.
        return {"engine_process": "a server's", "attention_backend": engine.attention}
    import torch

    own_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0"
    through_vllm = teacher.settings.engine == "vllm"
    return {
        "engine_process": "its own" if through_vllm and own_process else "the worker's",
        "tensor_parallel_size": teacher.settings.tensor_parallel_size if through_vllm else 1,
        "device": device_name(on_gpu=teacher.info.device == "cuda"),
        "attention_backend": engine.attention,
        "batch_invariant": through_vllm and os.environ.get("VLLM_BATCH_INVARIANT", "0") == "1",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        # What compiles the loops that reduce logits; on a GPU without Triton others do it.
        "triton": _version("triton") if teacher.info.device == "cuda" else "",
        "numba": _version("numba") if teacher.info.device != "cuda" else "",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def agree_on_environment(store: Store, environment: dict[str, Any]) -> None:
    """Record a worker's environment, or compare it with the first one's, and log what differs.

    Args:
        store: the cache's root.
        environment: as `describe_environment` returns it.

    Raises:
        CacheError: something chosen differs, so that bytes would as well.
    """
    content = json.dumps(environment, indent=1, sort_keys=True).encode()
    if store.create(ENVIRONMENT, content):
        return
    try:
        found = dict(json.loads(store.read(ENVIRONMENT)))
    except (FileNotFoundError, ValueError, TypeError):
        store.write(ENVIRONMENT, content)  # cut short by a power failure: nothing to agree with
        return
    names = [name for name in environment if found.get(name) != environment[name]]
    if not names:
        return
    difference = ", ".join(
        f"{name.replace('_', ' ')} {found.get(name)!r} there, {environment[name]!r} here"
        for name in names
    )
    if any(name in _MUST_AGREE for name in names):
        raise CacheError(
            f"{store.url}: its shards were made in another environment ({difference})",
            expected="workers of one cache that compute alike",
            do="set what differs as it is there, choose another --cache_dir, or delete "
            f"{ENVIRONMENT} to mix both",
        )
    _log.warning(
        "this worker differs from the first one of this cache (%s): the last bits of its shards "
        "may differ from what that one would have written",
        difference,
    )
