"""Whose folder it is while the teacher writes: the plan of the responses, with the identity."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from pipeline.cache.layout.names import RESPONSES
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.teacher.capture.plan import (
    another_identity,
    begun_identity,
    identity_difference,
    plan_identity,
)
from pipeline.teacher.generation.plan import WritingTask

__all__ = ["RESPONSE_PLAN", "reject_written_responses", "settle_responses"]

RESPONSE_PLAN = f"{RESPONSES}/plan.json"


def settle_responses(store: Store, task: WritingTask) -> None:
    """Write the plan of the responses, or agree with what is there.

    Raises:
        CacheError: the store holds a cache, or the start of one, of another identity.
    """
    begun = begun_identity(store)
    if begun is not None and begun != task.identity:
        raise _another(store, begun, task.identity)
    content = json.dumps(
        {
            "identity": task.identity,
            "identity_digest": fingerprint(task.identity),
            **task.plan.to_json(),
        },
        indent=1,
        ensure_ascii=False,
    ).encode()
    if store.create(RESPONSE_PLAN, content):
        return
    present = store.read(RESPONSE_PLAN)
    if present != content:
        found = plan_identity(store, RESPONSE_PLAN, present, "responses")
        raise _another(store, found, task.identity)


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
