"""Whose folder it is while the teacher writes: the plan of the responses, with the identity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from pipeline.cache.layout.names import RESPONSE_PLAN
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.teacher.capture.plan import (
    another_identity,
    begun_identity,
    folder_identity,
    identity_difference,
    plan_identity,
)
from pipeline.teacher.generation.plan import WritingTask

__all__ = [
    "complete_responses",
    "planned_files",
    "reject_other_responses",
    "reject_written_responses",
    "reopen_responses",
    "settle_responses",
]


def settle_responses(store: Store, task: WritingTask) -> None:
    """Write whose the responses are, or agree with what is there.

    Raises:
        CacheError: the store holds a cache, or the start of one, of another identity.
    """
    reject_other_responses(store, task.identity)
    if not store.create(RESPONSE_PLAN, _plan_bytes(task.identity)):
        reject_other_responses(store, task.identity)


def complete_responses(store: Store, task: WritingTask) -> None:
    """Add the numbers of the plan once all prompts are known; every worker writes the same."""
    prompts, each = task.prompts.counts(), task.plan.settings.responses
    numbers = {
        "prompts": prompts.samples,
        "responses": prompts.samples * each,
        "shards": len(task.prompts.shards),
        "prompt_counts": asdict(prompts),
    }
    content = _plan_bytes(task.identity, numbers)
    with suppress(FileNotFoundError):
        if store.read(RESPONSE_PLAN) == content:
            return
    store.write(RESPONSE_PLAN, content)


def reopen_responses(store: Store, task: WritingTask) -> None:
    """Take the numbers out of the plan while responses are written that shards were made from.

    Whoever comes then, after a kill as well, compares all responses with those shards.
    """
    if folder_identity(store) is not None and planned_files(store) is not None:
        store.write(RESPONSE_PLAN, _plan_bytes(task.identity))


def planned_files(store: Store) -> int | None:
    """Return how many files of responses there are to be; None where nobody knows yet."""
    try:
        found = json.loads(store.read(RESPONSE_PLAN)).get("shards")
    except (FileNotFoundError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None


def reject_other_responses(store: Store, identity: dict[str, Any]) -> None:
    """Keep a teacher that writes out of the folder of another cache.

    Raises:
        CacheError: the store holds a cache, or the start of one, of another identity.
    """
    begun = begun_identity(store)
    if begun is not None and begun != identity:
        raise _another(store, begun, identity)
    with suppress(FileNotFoundError):
        found = plan_identity(store, RESPONSE_PLAN, store.read(RESPONSE_PLAN), "responses")
        if found != identity:
            raise _another(store, found, identity)


def reject_written_responses(store: Store, identity: dict[str, Any]) -> None:
    """Keep a run that reads the corpus's own text out of a folder where the teacher writes.

    Raises:
        CacheError: responses have been begun there.
    """
    with suppress(FileNotFoundError):
        found = plan_identity(store, RESPONSE_PLAN, store.read(RESPONSE_PLAN), "responses")
        raise _another(store, found, identity)


def _another(store: Store, found: dict[str, Any], wanted: dict[str, Any]) -> CacheError:
    return another_identity(store, identity_difference(found, wanted))


def _plan_bytes(identity: dict[str, Any], numbers: Mapping[str, Any] | None = None) -> bytes:
    data = {"identity": identity, "identity_digest": fingerprint(identity), **(numbers or {})}
    return json.dumps(data, indent=1, ensure_ascii=False).encode()
