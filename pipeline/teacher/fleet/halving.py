"""Rows that a call fails on: found by halving, tried again, and left out of one last call.

What is kept always comes from one call with exactly the rows that are kept: the shapes of the
batches decide the last bits, so any worker makes the same bytes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.errors import DistillError, ModelError

__all__ = ["HalvingSearch", "Report", "short_error"]

_log = logging.getLogger(__name__)

_LONGEST_ERROR = 300

Report = Callable[[int], None]
"""Called with what was done since the last time."""


class _Row(Protocol):
    @property
    def row_id(self) -> str: ...


R = TypeVar("R", bound=_Row)
A = TypeVar("A")


def _no_fault(_answer: object) -> None:
    return None


def _not_asked(_rows: Sequence[_Row], _error: str) -> None:
    return None


@dataclass(frozen=True, slots=True)
class HalvingSearch(Generic[R, A]):
    """Answers rows by one call, without those that fail each time they are tried."""

    call: Callable[[Sequence[R], Report | None], list[A]]
    """Answers rows together; a `DistillError` of it is no row's failure and ends the search."""
    tries: int
    """How often a row may fail before it is quarantined."""
    rows: str
    """What the rows are called in messages, in the plural."""
    remedy: str
    """What helps where rows fail together, though none does alone."""
    fault: Callable[[A], str | None] = _no_fault
    """Says what is wrong with an answer, where something is."""
    before_halving: Callable[[Sequence[R], str], None] = _not_asked
    """Asked once several rows have failed together all times, with their error: raises where the
    engine answers nothing any more. The search would find that out after two calls a row."""

    def answer(
        self,
        rows: Sequence[R],
        quarantined: dict[str, QuarantinedRow],
        on_done: Report | None = None,
    ) -> list[A]:
        """Return the answers to all rows but the quarantined, of one call; adds to `quarantined`.

        Args:
            rows: to be answered together.
            quarantined: rows left out from the start, by id; those found are added.
            on_done: reports each unit of work once, however often it is computed.

        Returns:
            The answers, in order; none where all rows are quarantined.

        Raises:
            ModelError: rows fail together, though none does alone.
        """
        report = _Once(on_done)
        faults = Counter[str]()
        while rest := [row for row in rows if row.row_id not in quarantined]:
            answers = self._patiently(rest, report)
            if isinstance(answers, str):
                if len(rest) > 1:
                    self.before_halving(rest, answers)
                found = self._halve(rest, answers)
                if not found:
                    raise ModelError(
                        f"the teacher fails for {len(rest)} {self.rows} together, though for none "
                        f"alone ({answers})",
                        do=self.remedy,
                    )
            else:
                found = {}
                faulty = [
                    (row, fault)
                    for row, answer in zip(rest, answers, strict=True)
                    if (fault := self.fault(answer)) is not None
                ]
                if not faulty:
                    return answers
                for row, fault in faulty:
                    faults[row.row_id] += 1
                    failures = faults[row.row_id]
                    failed = self._alone(row, fault, failures)
                    if failed is None and failures >= self.tries:
                        # Right alone, never among the others.
                        failed = QuarantinedRow(row.row_id, fault, failures)
                    if failed is not None:
                        found[row.row_id] = failed
            for failed in found.values():
                _log.warning("%s is quarantined: %s", failed.sample_id, failed.error)
            quarantined |= found
        return []

    def _patiently(self, rows: Sequence[R], report: _Once) -> list[A] | str:
        """Return the answers, or the last error after all tries: what passes is no row's fault."""
        error = ""
        for attempt in range(1, self.tries + 1):
            try:
                return self.call(rows, report.of_new_call())
            except DistillError:
                raise
            except Exception as raised:
                error = short_error(raised)
                _log.warning(
                    "the teacher failed for %d %s, try %d: %s",
                    len(rows), self.rows, attempt, error,
                )  # fmt: skip
        return error

    def _halve(self, rows: Sequence[R], error: str) -> dict[str, QuarantinedRow]:
        """Return the rows that fail alone, of rows that have failed together all times."""
        if len(rows) == 1:
            return {rows[0].row_id: QuarantinedRow(rows[0].row_id, error, self.tries)}
        found: dict[str, QuarantinedRow] = {}
        middle = len(rows) // 2
        for part in (rows[:middle], rows[middle:]):
            if len(part) == 1:
                failed = self._alone(part[0], "", 0)
                found |= {} if failed is None else {failed.sample_id: failed}
            elif self._raises(part):
                # In company once, because its members are tried again.
                found |= self._halve(part, "")
        return found

    def _raises(self, rows: Sequence[R]) -> bool:
        try:
            self.call(rows, None)
        except DistillError:
            raise
        except Exception:
            return True
        return False

    def _alone(self, row: R, error: str, failures: int) -> QuarantinedRow | None:
        """Try one row by itself until it is answered or has failed often enough."""
        while failures < self.tries:
            failures += 1
            try:
                (answer,) = self.call([row], None)
            except DistillError:
                raise
            except Exception as raised:
                error = short_error(raised)
                continue
            fault = self.fault(answer)
            if fault is None:
                return None
            error = fault
        return QuarantinedRow(row.row_id, error, failures)


class _Once:
    """Counters, one for each call, that together report nothing twice."""

    def __init__(self, on_done: Report | None) -> None:
        self._on_done = on_done
        self._reported = 0

    def of_new_call(self) -> Report | None:
        """Return the counter of a call that starts over."""
        if self._on_done is None:
            return None
        seen = 0

        def count(done: int) -> None:
            nonlocal seen
            seen += done
            if seen > self._reported and self._on_done is not None:
                self._on_done(seen - self._reported)
                self._reported = seen

        return count


def short_error(error: BaseException) -> str:
    """Return the kind of an error and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_LONGEST_ERROR]
