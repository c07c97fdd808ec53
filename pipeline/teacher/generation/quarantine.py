"""Responses of one call, without those that the teacher fails on: these are quarantined."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.errors import ModelError
from pipeline.teacher.fleet.halving import HalvingSearch, Report
from pipeline.teacher.generation.base import Generator, WriteRequest, Written

__all__ = ["write_or_quarantine"]


def write_or_quarantine(
    generator: Generator,
    requests: Sequence[WriteRequest],
    *,
    tries: int,
    on_responses: Report | None = None,
) -> list[Written | QuarantinedRow]:
    """Return each response, or why there is none.

    Args:
        generator: a loaded teacher.
        requests: of one shard.
        tries: how often a request may fail before it is quarantined.
        on_responses: called with finished responses; quarantined ones count as finished.

    Raises:
        ModelError: the teacher answers none of the requests, or fails for all together though for
            none alone.
    """

    def write(rows: Sequence[WriteRequest], on_done: Report | None) -> list[Written]:
        return generator.write(rows, on_responses=on_done)

    quarantined: dict[str, QuarantinedRow] = {}
    remedy = "lower teacher.batch_tokens or generate.shard_prompts"
    search = HalvingSearch(write, tries, "responses", remedy)
    written = search.answer(requests, quarantined, on_responses)
    if requests and not written:
        first = quarantined[requests[0].response_id]
        raise ModelError(
            f"the teacher writes nothing for {len(requests)} prompts; of response "
            f"{first.sample_id}: {first.error}",
            expected="a teacher that answers",
            do="check its weights and the engine's memory, then run the same command again",
        )
    if quarantined and on_responses is not None:
        on_responses(len(quarantined))
    answers = iter(written)
    return [quarantined.get(r.response_id) or next(answers) for r in requests]
