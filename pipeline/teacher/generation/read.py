"""Files of responses to the corpus that is captured."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.cache.layout.names import RESPONSES
from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.config import fingerprint
from pipeline.corpus.corpus import Corpus
from pipeline.errors import CacheError, ModelError
from pipeline.storage import Store
from pipeline.teacher.capture.identity import as_begun
from pipeline.teacher.capture.plan import folder_identity
from pipeline.teacher.generation.files import ReadResponses, decode_responses
from pipeline.teacher.generation.plan import ResponsePlan, ResponseShard, WritingTask

__all__ = [
    "Responses",
    "check_limit",
    "finished_responses",
    "read_files",
    "responses_done",
    "to_responses",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Responses:
    """What the teacher wrote."""

    corpus: Corpus
    """Prompts and responses."""
    quarantined: Mapping[str, tuple[QuarantinedRow, ...]]
    """Responses that the teacher could not write, by shard of responses; not in the corpus."""


def finished_responses(task: WritingTask, store: Store) -> Responses | None:
    """Return the responses where every one is there; for estimates.

    Raises:
        CacheError: the responses there are not those of the cache beside them.
    """
    if responses_done(task.plan, store) < task.plan.total:
        return None
    files: list[ReadResponses] = []
    for shard in task.plan.shards():
        found = _read(shard, task, store)
        if found is None:
            return None
        files.append(found)
    return to_responses(files, task, store)


def responses_done(plan: ResponsePlan, store: Store) -> int:
    """Return how many responses are in finished files, by one listing."""
    present = set(store.list(RESPONSES))
    return sum(
        len(shard.prompts) * plan.settings.responses
        for shard in plan.shards()
        if shard.file_name in present
    )


def read_files(task: WritingTask, store: Store) -> list[ReadResponses] | None:
    """Return all files of responses; None after damaged ones were removed."""
    files: list[ReadResponses] = []
    damaged = False
    for shard in task.plan.shards():
        found = _read(shard, task, store)
        if found is None:
            _log.warning("%s: damaged or missing; written again", store.full_url(shard.file))
            store.delete(shard.file)
            damaged = True
        else:
            files.append(found)
    return None if damaged else files


def to_responses(files: Sequence[ReadResponses], task: WritingTask, store: Store) -> Responses:
    """Return the corpus of all responses.

    Raises:
        CacheError: the cache there was made from other responses.
    """
    plan = task.plan
    corpus = plan.corpus([tokens_N for file in files for tokens_N in file.tokens])
    written = corpus.identity["responses"]
    _log.info(
        "responses: %d, %d tokens, %d of them cut off at %d tokens",
        written["count"], written["tokens"], written["unfinished"], plan.settings.max_new_tokens,
    )  # fmt: skip
    planned = folder_identity(store)
    if planned is not None and as_begun(planned) == task.identity:
        found = planned["corpus"]["responses"]
        if found != written:
            raise CacheError(
                f"{store.url}: responses that were lost and written again came out otherwise "
                f"({found['tokens']} tokens before, {written['tokens']} now), and the shards there "
                "are made from the old ones",
                expected=f"the files of {RESPONSES} as they were",
                do="bring them back, or delete that cache",
            )
    quarantined = {
        shard.name: file.quarantined
        for shard, file in zip(plan.shards(), files, strict=True)
        if file.quarantined
    }
    return Responses(corpus, quarantined)


def check_limit(files: Sequence[ReadResponses], task: WritingTask, store: Store) -> None:
    """Stop before the capture when too many responses are quarantined.

    Raises:
        ModelError: they are more than `capture.max_quarantined_fraction`.
    """
    count = sum(len(file.quarantined) for file in files)
    allowed = max(1, math.floor(task.settings.max_quarantined_fraction * task.plan.total))
    if count <= allowed:
        return
    lacking = [
        (shard, file)
        for shard, file in zip(task.plan.shards(), files, strict=True)
        if file.quarantined
    ]
    last = lacking[-1][1].quarantined[-1]
    shown = ", ".join(shard.file for shard, _ in lacking[:3]) + (" ..." if lacking[3:] else "")
    raise ModelError(
        f"{store.url}: {count} of {task.plan.total} responses could not be written, the last of "
        f"them {last.sample_id}: {last.error}",
        expected=f"at most {allowed} (capture.max_quarantined_fraction)",
        do=f"mend the teacher, delete {shown} and run the same command again, or allow more; "
        "the other responses are kept",
    )


def _read(shard: ResponseShard, task: WritingTask, store: Store) -> ReadResponses | None:
    names = [request.response_id for request in task.plan.requests(shard.prompts)]
    try:
        data = store.read(shard.file)
    except FileNotFoundError:
        return None
    return decode_responses(data, response_ids=names, identity_digest=fingerprint(task.identity))
