"""Prompts that the teacher cannot answer: found by halving, and left out so that the rest goes on.

What is kept always comes from one call with exactly the prompts that are kept, so that any worker
writes the same tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.errors import DistillError, ModelError
from pipeline.teacher.fleet.quarantine import short_error, told_once
from pipeline.teacher.generation.base import Generator, WriteRequest, Written

__all__ = ["write_patiently"]

_log = logging.getLogger(__name__)


def write_patiently(
    generator: Generator,
    requests: Sequence[WriteRequest],
    *,
    tries: int,
    on_responses: Callable[[int], None] | None = None,
) -> list[Written | QuarantinedRow]:
    """Return each response, or why there is none.

    Args:
        generator: a loaded teacher.
        requests: of one shard.
        tries: how often a request may fail before it is left out.
        on_responses: told of finished responses; left-out ones count as finished.

    Raises:
        ModelError: the teacher answers none of the requests, or fails for all together though for
            none alone.
    """
    rest, failed = list(requests), dict[str, QuarantinedRow]()
    new_call = told_once(on_responses)
    while rest:
        written = _write(generator, rest, tries, new_call)
        if not isinstance(written, str):
            done = dict(zip((r.response_id for r in rest), written, strict=True))
            if failed and on_responses is not None:
                on_responses(len(failed))
            return [done.get(r.response_id) or failed[r.response_id] for r in requests]
        found = _blame(generator, rest, tries, written)
        if not found:
            raise ModelError(
                f"the teacher fails for {len(rest)} responses together, though for none alone "
                f"({written})",
                do="lower teacher.batch_tokens or generate.shard_prompts",
            )
        failed |= found
        rest = [request for request in requests if request.response_id not in failed]
    first = failed[requests[0].response_id]
    raise ModelError(
        f"the teacher writes nothing for {len(requests)} prompts; of response {first.sample_id}: "
        f"{first.error}",
        expected="a teacher that answers",
        do="check its weights and the engine's memory, then run the same command again",
    )


def _write(
    generator: Generator,
    requests: Sequence[WriteRequest],
    tries: int,
    new_call: Callable[[], Callable[[int], None] | None] = lambda: None,
) -> list[Written] | str:
    """Return the responses, or the last error after so many tries."""
    error = ""
    for attempt in range(1, tries + 1):
        try:
            return generator.write(requests, on_responses=new_call())
        except DistillError:
            raise
        except Exception as raised:
            error = short_error(raised)
            _log.warning("writing %d responses failed, try %d: %s", len(requests), attempt, error)
    return error


def _blame(
    generator: Generator, requests: Sequence[WriteRequest], tries: int, error: str
) -> dict[str, QuarantinedRow]:
    """Return the requests that fail each time, by halving requests that fail together."""
    if len(requests) == 1:
        name = requests[0].response_id
        _log.warning("response %s is left out: %s", name, error)
        return {name: QuarantinedRow(name, error, tries)}
    middle = len(requests) // 2
    found: dict[str, QuarantinedRow] = {}
    for part in (requests[:middle], requests[middle:]):
        # Alone as often as asked for; in company once, because its members are tried again.
        written = _write(generator, part, tries if len(part) == 1 else 1)
        if isinstance(written, str):
            found |= _blame(generator, part, tries, written)
    return found
