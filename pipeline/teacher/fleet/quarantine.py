"""Rows that the engine cannot answer: found, tried again, and left out so that the rest goes on.

A row fails when its columns are not finite, when the engine raises for it, or when it takes the
process with it. The columns that are kept always come from one call with exactly the rows that are
kept: the shapes of the batches decide the last bits, so any worker makes the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.errors import DistillError, ModelError
from pipeline.teacher.engines.base import CaptureRequest, Engine
from pipeline.teacher.fleet.inflight import Breadcrumb

__all__ = ["Answered", "EngineLost", "GuardedEngine", "short_error", "told_once"]

_log = logging.getLogger(__name__)

_LONGEST_ERROR = 300


@dataclass(frozen=True, slots=True)
class Answered:
    """What a shard came to."""

    columns: list[NDArray[np.float32]]
    """Of the rows that did not fail, in order."""
    failed: tuple[QuarantinedRow, ...]


class EngineLost(ModelError):
    """The engine answered before and answers nothing any more (a broken device context)."""


class GuardedEngine:
    """An engine whose poisonous rows are found and left out."""

    def __init__(
        self, engine: Engine, *, tries: int, elsewhere: Callable[[], Sequence[CaptureRequest]]
    ) -> None:
        """Keep the parts.

        Args:
            engine: a loaded teacher.
            tries: how often a row may fail before it is left out.
            elsewhere: a few rows of other shards, to tell a bad shard from a bad engine.
        """
        self._engine = engine
        self._tries = tries
        self._elsewhere = elsewhere
        self._answered_before = False

    def capture(
        self,
        requests: Sequence[CaptureRequest],
        *,
        known: Sequence[QuarantinedRow] = (),
        crumb: Breadcrumb | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Answered:
        """Return the columns of the rows that can be answered, and the rows that cannot.

        Args:
            requests: the shard's rows.
            known: rows that are quarantined already.
            crumb: where to note each row before the engine gets it; for a shard whose attempts
                end with their process.
            on_tokens: told of each token once, however often it is computed.

        Raises:
            ModelError: every row fails, and so do rows of other shards; or the engine fails for
                the shard as a whole, but for none of its rows.
            EngineLost: the same, of an engine that has worked in this process.
        """
        failed = {row.sample_id: row for row in known}
        if crumb is not None:
            self._probe(requests, crumb, failed)
        try:
            columns = self._capture_rest(requests, failed, told_once(on_tokens))
        except EngineLost:
            raise
        except BaseException:
            if crumb is not None:
                crumb.take_back()
            raise
        return Answered(
            columns, tuple(failed[r.sample_id] for r in requests if r.sample_id in failed)
        )

    def greet(self, requests: Sequence[CaptureRequest]) -> None:
        """See whether the engine answers for rows that are known to be harmless.

        If it does, and nothing more after the next shard, then that shard has broken it.
        """
        self._answered_before |= self._answers_any(requests)

    def _capture_rest(
        self,
        requests: Sequence[CaptureRequest],
        failed: dict[str, QuarantinedRow],
        on_tokens: Callable[[], Callable[[int], None]],
    ) -> list[NDArray[np.float32]]:
        """Return the columns of one call with all rows but the failed; adds to `failed`."""
        before = len(failed)
        bad_tries: dict[str, int] = {}
        while True:
            rest = [r for r in requests if r.sample_id not in failed]
            if not rest:
                if len(failed) > before:
                    self._check_engine(failed[requests[0].sample_id])
                return []
            try:
                columns = self._patiently(rest, on_tokens)
            except DistillError:
                raise
            except Exception as error:
                found = self._blame(rest)
                if not found:
                    raise ModelError(
                        f"the engine fails for {len(rest)} rows together, though for none alone "
                        f"({short_error(error)})",
                        do="lower teacher.batch_tokens or capture.head_rows",
                    ) from error
                failed |= found
                continue
            bad = {
                request.sample_id: where
                for request, columns_NC in zip(rest, columns, strict=True)
                if (where := _first_not_finite(columns_NC)) is not None
            }
            if not bad:
                self._answered_before = True
                return columns
            self._answered_before |= len(bad) < len(rest)
            for request in rest:
                if request.sample_id in bad:
                    self._try_not_finite(request, bad[request.sample_id], bad_tries, failed)

    def _patiently(
        self,
        requests: Sequence[CaptureRequest],
        on_tokens: Callable[[], Callable[[int], None]],
    ) -> list[NDArray[np.float32]]:
        """Capture, and again where the engine raises: what passes is no row's fault."""
        for attempt in range(1, self._tries + 1):
            try:
                return self._engine.capture(requests, on_tokens=on_tokens())
            except DistillError:
                raise
            except Exception as error:
                _log.warning("the engine failed, try %d: %s", attempt, short_error(error))
                if attempt == self._tries:
                    raise
        raise AssertionError("unreachable")

    def _blame(self, requests: Sequence[CaptureRequest]) -> dict[str, QuarantinedRow]:
        """Return the rows for which the engine raises each time, by halving."""
        if len(requests) == 1:
            row = self._alone(requests[0], 0)
            return {} if row is None else {row.sample_id: row}
        found: dict[str, QuarantinedRow] = {}
        middle = len(requests) // 2
        for part in (requests[:middle], requests[middle:]):
            try:
                self._engine.capture(part)
            except DistillError:
                raise
            except Exception:
                found |= self._blame(part)
        return found

    def _alone(self, request: CaptureRequest, tries: int) -> QuarantinedRow | None:
        """Try one row by itself until it is answered or has failed often enough."""
        error = ""
        while tries < self._tries:
            tries += 1
            try:
                (columns_NC,) = self._engine.capture([request])
            except DistillError:
                raise
            except Exception as raised:
                error = short_error(raised)
                continue
            where = _first_not_finite(columns_NC)
            if where is None:
                return None
            error = _not_finite(where)
        return QuarantinedRow(request.sample_id, error, tries)

    def _try_not_finite(
        self,
        request: CaptureRequest,
        where: int,
        tries: dict[str, int],
        failed: dict[str, QuarantinedRow],
    ) -> None:
        name = request.sample_id
        tries[name] = tries.get(name, 0) + 1
        row = self._alone(request, tries[name])
        if row is None and tries[name] >= self._tries:  # finite alone, never among the others
            row = QuarantinedRow(name, _not_finite(where), tries[name])
        if row is not None:
            # Without an attempt alone (tries: 1) the error is that of the batch.
            failed[name] = QuarantinedRow(name, row.error or _not_finite(where), row.tries)
            _log.warning("sample %s is quarantined: %s", name, failed[name].error)

    def _probe(
        self,
        requests: Sequence[CaptureRequest],
        crumb: Breadcrumb,
        failed: dict[str, QuarantinedRow],
    ) -> None:
        """Hand the engine row after row; of a row that kills the process, the note is left.

        After the last row, the shard as a whole is the thing that may kill.
        """
        crumb.read()
        first, tries_there = crumb.at, crumb.tries
        for index in range(first, len(requests) + 1):
            if index < len(requests) and requests[index].sample_id in failed:
                continue
            tries = tries_there if index == first else 0
            if tries >= self._tries:
                if index == len(requests):
                    raise ModelError(
                        f"shard {crumb.shard} ended its process {tries} times, though none of its "
                        "rows does alone",
                        do="lower teacher.batch_tokens or capture.head_rows",
                    )
                crumb.dead = (*crumb.dead, requests[index].sample_id)
                continue
            crumb.drop(index, tries + 1)
            if index < len(requests):
                self._hand_over(requests[index], crumb)
        for name in crumb.dead:
            failed[name] = QuarantinedRow(
                name, "the process died while the engine had it", self._tries
            )
            _log.warning("sample %s is quarantined: %s", name, failed[name].error)

    def _hand_over(self, request: CaptureRequest, crumb: Breadcrumb) -> None:
        try:
            self._engine.capture([request])
        except Exception as error:
            if isinstance(error, DistillError):
                crumb.take_back()
                raise
            # An error of the row alone is found again, and counted, with the whole shard.
            self._check_engine(QuarantinedRow(request.sample_id, short_error(error), 1))
        except BaseException:
            crumb.take_back()
            raise
        else:
            self._answered_before = True

    def _check_engine(self, row: QuarantinedRow) -> None:
        """Return where the engine still answers for rows of other shards."""
        if self._answers_any(self._elsewhere()):
            self._answered_before = True
            return
        lost = EngineLost if self._answered_before else ModelError
        raise lost(
            f"the teacher answers for no row; of sample {row.sample_id}: {row.error}",
            expected="finite logits",
            do="run the teacher in bfloat16 or float32 (float16 overflows), check its weights and "
            "the engine's memory, then run the same command again; no row was quarantined for this",
        )

    def _answers_any(self, requests: Sequence[CaptureRequest]) -> bool:
        for request in requests:
            try:
                (columns_NC,) = self._engine.capture([request])
            except DistillError:
                raise
            except Exception:
                continue
            if _first_not_finite(columns_NC) is None:
                return True
        return False


def _first_not_finite(columns_NC: NDArray[np.float32]) -> int | None:
    finite_N = np.isfinite(columns_NC).all(axis=1)
    return None if finite_N.all() else int(np.flatnonzero(~finite_N)[0])


def _not_finite(where: int) -> str:
    return f"the logits of supervised position {where} are not finite"


def short_error(error: BaseException) -> str:
    """Return the kind of an error and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_LONGEST_ERROR]


def told_once(on_tokens: Callable[[int], None] | None) -> Callable[[], Callable[[int], None]]:
    """Return a maker of counters, one for each call, that together report no token twice."""
    reported = 0

    def new_call() -> Callable[[int], None]:
        seen = 0

        def count(tokens: int) -> None:
            nonlocal seen, reported
            seen += tokens
            if on_tokens is not None and seen > reported:
                on_tokens(seen - reported)
                reported = seen

        return count

    return new_call
