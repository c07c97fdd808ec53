"""Whose folder it is while the teacher writes: the identity before and after the responses."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline.cache.layout.manifest import (
    MANIFEST,
    PLAN,
    RESPONSES,
    describe_difference,
    read_manifest,
)
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.teacher.capture.identity import as_begun
from pipeline.teacher.capture.plan import another_identity, planned_identity
from pipeline.teacher.capture.run import Prepared
from pipeline.teacher.generation.plan import ResponsePlan

__all__ = [
    "RESPONSE_PLAN",
    "PlannedCache",
    "planned_cache",
    "refuse_written_responses",
    "settle_responses",
]

RESPONSE_PLAN = f"{RESPONSES}/plan.json"


@dataclass(frozen=True, slots=True)
class PlannedCache:
    """The identity of the cache that the folder holds, or begins."""

    identity: dict[str, Any]

    @property
    def as_begun(self) -> dict[str, Any]:
        """The part that is known before a response is written."""
        return as_begun(self.identity)


def planned_cache(store: Store) -> PlannedCache | None:
    """Return what the folder's plan or manifest says; what is damaged is for others to complain."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        return PlannedCache(dict(json.loads(store.read(PLAN))["identity"]))
    if store.exists(MANIFEST):
        with suppress(CacheError):
            return PlannedCache(read_manifest(store).identity)
    return None


def settle_responses(store: Store, prepared: Prepared, plan: ResponsePlan) -> None:
    """Write the plan of the responses, or agree with what is there.

    Raises:
        CacheError: the store holds a cache, or the start of one, of another identity.
    """
    planned = planned_cache(store)
    if planned is not None and planned.as_begun != prepared.identity:
        raise _another(store, planned.as_begun, prepared.identity)
    content = json.dumps(
        {
            "identity": prepared.identity,
            "identity_digest": prepared.identity_digest,
            **plan.to_json(),
        },
        indent=1,
        ensure_ascii=False,
    ).encode()
    if store.create(RESPONSE_PLAN, content):
        return
    present = store.read(RESPONSE_PLAN)
    if present != content:
        raise _another(
            store, planned_identity(store, RESPONSE_PLAN, present, "responses"), prepared.identity
        )


def refuse_written_responses(store: Store, prepared: Prepared) -> None:
    """Keep a run that reads the corpus's own text out of a folder where the teacher writes.

    Raises:
        CacheError: responses have been begun there.
    """
    with suppress(FileNotFoundError):
        found = planned_identity(store, RESPONSE_PLAN, store.read(RESPONSE_PLAN), "responses")
        raise _another(store, found, prepared.identity)


def _another(store: Store, found: dict[str, Any], wanted: dict[str, Any]) -> CacheError:
    written = ["generate" in identity["corpus"] for identity in (found, wanted)]
    if written[0] != written[1]:
        whose = ["the teacher's" if own else "the corpus's" for own in written]
        difference = f"responses: {whose[0]} there, {whose[1]} asked for"
    else:
        difference = describe_difference(found, wanted)
    return another_identity(store, difference)
