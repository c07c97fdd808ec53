"""The engine, guarded: rows that it fails on are quarantined, a broken engine is told from them.

A row fails when its columns are not finite, when the engine raises for it, or when it takes the
process with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.errors import DistillError, ModelError
from pipeline.teacher.engines.base import CaptureRequest, Engine
from pipeline.teacher.fleet.halving import HalvingSearch, Report, short_error
from pipeline.teacher.fleet.inflight import InFlightMarker, row_after_row

__all__ = ["Answered", "EngineLost", "GuardedEngine", "foreign_id"]

_log = logging.getLogger(__name__)

_OWN_WITNESSES = 8
_REMEDY = "lower teacher.batch_tokens or capture.head_rows"


@dataclass(frozen=True, slots=True)
class Answered:
    """What a shard came to."""

    columns: list[NDArray[np.float32]]
    """Of the rows that are not quarantined, in order."""
    quarantined: tuple[QuarantinedRow, ...]

    @property
    def quarantined_ids(self) -> frozenset[str]:
        """The rows that the shard goes without."""
        return frozenset(row.sample_id for row in self.quarantined)


class EngineLost(ModelError):
    """The engine answered before and answers nothing any more (a broken device context)."""


class GuardedEngine:
    """An engine whose failing rows are found and left out."""

    def __init__(
        self, engine: Engine, *, tries: int, witnesses: Callable[[], Sequence[CaptureRequest]]
    ) -> None:
        """Keep the parts.

        Args:
            engine: a loaded teacher.
            tries: how often a row may fail before it is quarantined.
            witnesses: returns a few rows of other shards, to tell a bad shard from a bad engine.
        """
        self._engine = engine
        self._tries = tries
        self._witnesses = witnesses
        self._answered_before = False
        self._search = HalvingSearch(
            self._call, tries, "rows", _REMEDY, _not_finite, self._check_before_halving
        )

    def capture(
        self,
        requests: Sequence[CaptureRequest],
        *,
        known: Sequence[QuarantinedRow] = (),
        marker: InFlightMarker | None = None,
        on_tokens: Report | None = None,
    ) -> Answered:
        """Return the columns of the rows that can be answered, and the rows that cannot.

        Args:
            requests: the shard's rows.
            known: rows that are quarantined already.
            marker: where to note each row before the engine gets it; for a shard whose attempts
                end with their process.
            on_tokens: called with each token once, however often it is computed.

        Raises:
            ModelError: every row fails, and so do rows of other shards; or the engine fails for
                the shard as one, but for none of its rows.
            EngineLost: the same, of an engine that has worked in this process.
        """
        quarantined = {row.sample_id: row for row in known} | self._beyond_the_head(requests)
        if marker is not None:
            row_after_row(
                requests, marker, quarantined, tries=self._tries,
                hand_over=partial(self._hand_over, marker=marker), remedy=_REMEDY,
            )  # fmt: skip
        before = len(quarantined)
        try:
            columns = self._search.answer(requests, quarantined, on_tokens)
            if not columns and len(quarantined) > before:
                self._check_engine(quarantined[requests[0].sample_id])
        except EngineLost:
            raise
        except BaseException:
            if marker is not None:
                marker.take_back()
            raise
        return Answered(
            columns, tuple(quarantined[r.row_id] for r in requests if r.row_id in quarantined)
        )

    def _beyond_the_head(self, requests: Sequence[CaptureRequest]) -> dict[str, QuarantinedRow]:
        """Return the rows with an id that the teacher has no row of weights for.

        On a CPU the engine would raise for them. On a GPU a kernel's assertion ends the device's
        context, and every later call fails as well.
        """
        found = {}
        for request in requests:
            fault = foreign_id(request, self._engine.vocab_size)
            if fault is not None:
                found[request.row_id] = QuarantinedRow(request.row_id, fault, 0)
                _log.warning("%s is quarantined: %s", request.row_id, fault)
        return found

    def greet(self, requests: Sequence[CaptureRequest]) -> None:
        """See whether the engine answers for rows that are known to be harmless.

        If it does, and nothing more after the next shard, then that shard has broken it.
        """
        self._answers_any(requests)

    def _call(
        self, requests: Sequence[CaptureRequest], on_tokens: Report | None
    ) -> list[NDArray[np.float32]]:
        columns = self._engine.capture(requests, on_tokens=on_tokens)
        # Not finite is no answer: a teacher that never gave one is a broken teacher.
        self._answered_before |= any(_not_finite(columns_NC) is None for columns_NC in columns)
        return columns

    def _hand_over(self, request: CaptureRequest, marker: InFlightMarker) -> None:
        try:
            self._call([request], None)
        except Exception as error:
            if isinstance(error, DistillError):
                marker.take_back()
                raise
            # An error of the row alone is found again, and counted, with all of the shard.
            self._check_engine(QuarantinedRow(request.row_id, short_error(error), 1))
        except BaseException:
            marker.take_back()
            raise

    def _check_engine(self, row: QuarantinedRow) -> None:
        """Return where the engine still answers for rows of other shards."""
        if not self._answers_any(self._witnesses()):
            raise self._lost(row)

    def _lost(self, row: QuarantinedRow) -> ModelError:
        lost = EngineLost if self._answered_before else ModelError
        return lost(
            f"the teacher answers for no row; of sample {row.sample_id}: {row.error}",
            expected="finite logits",
            do="run the teacher in bfloat16 or float32 (float16 overflows), check its weights and "
            "the engine's memory, then run the same command again; no row was quarantined for this",
        )

    def _check_before_halving(self, rows: Sequence[CaptureRequest], error: str) -> None:
        """Ask whether the engine lives, before rows that failed together are searched.

        Rows of other shards tell. Of a cache of one shard, a few of its own do, from end to end: of
        rows that fail one by one there are never so many.
        """
        if self._answers_any(self._witnesses() or rows[:: max(1, len(rows) // _OWN_WITNESSES)]):
            return
        raise self._lost(QuarantinedRow(rows[0].row_id, error, self._tries))

    def _answers_any(self, requests: Sequence[CaptureRequest]) -> bool:
        for request in requests:
            if foreign_id(request, self._engine.vocab_size) is not None:
                continue
            try:
                (columns_NC,) = self._call([request], None)
            except DistillError:
                raise
            except Exception:
                continue
            if _not_finite(columns_NC) is None:
                return True
        return False


def foreign_id(request: CaptureRequest, vocab_size: int) -> str | None:
    """Return what is wrong with a row's ids, for a head and an embedding of so many rows."""
    ids_L = request.input_ids_L
    bad_N = np.flatnonzero((ids_L < 0) | (ids_L >= vocab_size))
    if not bad_N.size:
        return None
    where = int(bad_N[0])
    return f"token id {ids_L[where]} at position {where} is beyond the teacher's {vocab_size} rows"


def _not_finite(columns_NC: NDArray[np.float32]) -> str | None:
    finite_N = np.isfinite(columns_NC).all(axis=1)
    if finite_N.all():
        return None
    where = int(np.flatnonzero(~finite_N)[0])
    return f"the logits of supervised position {where} are not finite"
