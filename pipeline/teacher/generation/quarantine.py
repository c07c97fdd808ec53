"""Responses of one call, without those that the teacher fails on: these are quarantined."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.errors import DistillError, ModelError
from pipeline.teacher.fleet.halving import HalvingSearch, Report
from pipeline.teacher.fleet.inflight import InFlightMarker, row_after_row
from pipeline.teacher.generation.base import Generator, WriteRequest, Written

__all__ = ["write_or_quarantine"]

_log = logging.getLogger(__name__)

_WITNESSES = 8
"""Prompts of a shard, from end to end, by which a broken engine is told from bad prompts."""


def write_or_quarantine(
    generator: Generator,
    requests: Sequence[WriteRequest],
    *,
    tries: int,
    marker: InFlightMarker | None = None,
    on_responses: Report | None = None,
) -> list[Written | QuarantinedRow]:
    """Return each response, or why there is none.

    Args:
        generator: a loaded teacher.
        requests: of one shard.
        tries: how often a request may fail before it is quarantined.
        marker: where to note each request before the teacher gets it; for a shard whose attempts
            end with their process.
        on_responses: called with finished responses; quarantined ones count as finished.

    Raises:
        ModelError: the teacher answers none of the requests, or fails for all together though for
            none alone.
    """

    def write(rows: Sequence[WriteRequest], on_done: Report | None) -> list[Written]:
        return generator.write(rows, on_responses=on_done)

    quarantined: dict[str, QuarantinedRow] = {}
    remedy = "lower teacher.batch_tokens or generate.shard_prompts"

    def ask_first(rows: Sequence[WriteRequest], error: str) -> None:
        """See that the teacher answers any of a few prompts, before all are searched."""
        for row in rows[:: max(1, len(rows) // _WITNESSES)]:
            try:
                generator.write([row])
            except DistillError:
                raise
            except Exception:
                continue
            return
        raise _answers_nothing(len(rows), rows[0].response_id, error)

    search = HalvingSearch(write, tries, "responses", remedy, before_halving=ask_first)

    def hand_over(request: WriteRequest) -> None:
        try:
            generator.write([request])
        except DistillError:
            raise
        except Exception as error:
            # Found again, and counted, with all of the shard.
            _log.debug("%s alone: %s", request.response_id, error)

    try:
        if marker is not None:
            row_after_row(
                requests, marker, quarantined, tries=tries, hand_over=hand_over, remedy=remedy
            )
        written = search.answer(requests, quarantined, on_responses)
    except BaseException:
        if marker is not None:
            marker.take_back()
        raise
    if requests and not written:
        first = quarantined[requests[0].response_id]
        raise _answers_nothing(len(requests), first.sample_id, first.error)
    if quarantined and on_responses is not None:
        on_responses(len(quarantined))
    answers = iter(written)
    return [quarantined.get(r.response_id) or next(answers) for r in requests]


def _answers_nothing(prompts: int, response_id: str, error: str) -> ModelError:
    return ModelError(
        f"the teacher writes nothing for {prompts} prompts; of response {response_id}: {error}",
        expected="a teacher that answers",
        do="check its weights and the engine's memory, then run the same command again",
    )
