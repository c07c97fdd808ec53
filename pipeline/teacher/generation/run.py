"""A model writes the responses: shards of prompts, leased by any number of workers.

A response file is created once and never replaced, so all workers go on from the same tokens even
where two of them, both alive, wrote the same shard. From the file its unit is made (`units.py`),
and with the last unit the capture can begin. Prompts are answered while others are prepared.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.cache.layout.manifest import Manifest
from pipeline.cache.layout.names import RESPONSE_UNITS, RESPONSES, response_name
from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.config import fingerprint
from pipeline.corpus.sample import Sample
from pipeline.errors import CacheError, ModelError
from pipeline.observe.shares import Shares
from pipeline.progress import Progress
from pipeline.storage import Store
from pipeline.teacher.capture.source import ShardSource
from pipeline.teacher.fleet.inflight import InFlightMarker
from pipeline.teacher.fleet.leases import LEASES, Lease, LeaseBoard
from pipeline.teacher.fleet.processes import worker_name
from pipeline.teacher.fleet.pulse import Pulse
from pipeline.teacher.fleet.queue import leased_work
from pipeline.teacher.generation.base import Generator, WriteRequest, Written
from pipeline.teacher.generation.files import (
    ReadResponses,
    ResponseText,
    encode_responses,
    prompts_digest,
    written_files,
)
from pipeline.teacher.generation.identity import (
    complete_responses,
    planned_files,
    reopen_responses,
    settle_responses,
)
from pipeline.teacher.generation.plan import WritingTask
from pipeline.teacher.generation.quarantine import write_or_quarantine
from pipeline.teacher.generation.registry import open_generator
from pipeline.teacher.generation.shards import ResponseShard
from pipeline.teacher.generation.units import RESPONSES_LOST, Lacking, ResponseUnits
from pipeline.teacher.generation.watched import WatchedGenerator
from pipeline.teacher.preparation.work import fold_summaries

__all__ = ["Responses", "can_write", "has_responses", "write_responses", "written_shards"]

_log = logging.getLogger(__name__)

_NAMES_UP_TO = 2048
"""Files of responses of a complete cache that are looked for at each start, as its shards are: a
listing of 100,000 is 100 requests, of each worker."""
_FOLDERS = (RESPONSES, LEASES, *(f"{RESPONSE_UNITS}/{name}" for name in ("summaries", "tokens")))
_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Responses:
    """What the teacher wrote."""

    source: ShardSource
    """The shards to capture: prompts and responses."""
    counts: Mapping[str, int]
    """For the manifest."""
    quarantined: Mapping[str, tuple[QuarantinedRow, ...]]
    """Responses that the teacher could not write, by shard of responses; in no shard."""


def write_responses(
    task: WritingTask,
    *,
    store: Store,
    progress_every_s: float,
    wait_for_more: Callable[[float], None] = time.sleep,
    check_files: bool = False,
    manifest: Manifest | None = None,
    pulse: Pulse | None = None,
) -> Responses:
    """Write what is missing of the responses and return all.

    A run that finds every response loads no teacher. The generator is closed before this returns:
    the device is free for the capture.

    Args:
        task: what is written; its prompts may still become known.
        store: the cache's root.
        progress_every_s: seconds between lines of progress.
        wait_for_more: waits for prompts to become known, at most so many seconds.
        check_files: read every file, and write the damaged ones again.
        manifest: of a cache that is complete but for its responses.
        pulse: notices a teacher that is stuck.

    Raises:
        CacheError: the store holds a cache, or the start of one, of another identity; or responses
            that were lost came out otherwise.
        CorpusError: the prompts cannot be prepared, or there are none.
        ModelError: the teacher answers no prompt of a shard, or too few in all.
    """
    settle_responses(store, task)
    units = ResponseUnits(task, store)
    pulse = pulse or Pulse()
    board = LeaseBoard(store, worker_name(), task.settings.lease_s, is_alive=lambda: pulse.is_alive)
    task.prompts.refresh()
    if check_files:
        while not task.prompts.is_complete:  # the files of prompts that come later as well
            wait_for_more(_WAIT_S)
            task.prompts.refresh()
        units.remove_damaged()
    progress = Progress(
        _responses(task),
        unit="responses",
        description="teacher writes" if task.writer.is_teacher else "writer writes",
        every_s=progress_every_s,
    )
    pool = _ResponsePool(task, units, board, progress)
    with progress, board.beating(), _Writer(task, units, board, progress, pulse) as writer:
        view = None
        while view is None or not view.is_complete:  # a damaged summary is made again
            for shard, lease in leased_work(
                pool, board, shares=Shares(), in_order=True, ahead=8, wait_for_more=wait_for_more
            ):
                writer.make(shard, lease)
            view = units.view()
    if manifest is not None or planned_files(store) is None:
        units.check_captured(view, manifest, writer.written)
    complete_responses(store, task)
    if manifest is not None:  # of another cache the last worker of the capture does it
        board.sweep()
        store.remove_partials(_FOLDERS)
    units.check_limit(view)
    report = view.report
    counts = {"responses": report.turns, "responses_unfinished": report.unended}
    if report.counts.get(RESPONSES_LOST):
        counts[RESPONSES_LOST] = report.counts[RESPONSES_LOST]
    quarantined = units.quarantined(view)
    task.prompts.release()
    return Responses(units.source(view), counts, quarantined)


def can_write(task: WritingTask) -> bool:
    """Look for more prompts; return whether there are any to answer."""
    task.prompts.refresh()
    return task.prompts.is_complete or bool(task.prompts.shards)


def has_responses(store: Store) -> bool:
    """Return whether every file of responses is there, as far as a few requests tell."""
    planned = planned_files(store)
    if planned is None or planned > _NAMES_UP_TO:
        return planned is not None
    names = written_files(store)
    return all(response_name(index) in names for index in range(planned))


def written_shards(task: WritingTask, store: Store) -> ShardSource | None:
    """Return the shards to capture where every response is there; writes nothing.

    Raises:
        CorpusError: the prompts are complete, and cannot be used.
    """
    task.prompts.refresh()
    if not task.prompts.is_complete:
        return None
    units = ResponseUnits(task, store, only_look=True)
    view = units.view()
    return units.source(view) if view.is_complete else None


def _responses(task: WritingTask) -> int:
    return task.prompts.projected().samples * task.plan.settings.responses


@dataclass(frozen=True, slots=True)
class _ResponseWork:
    """A shard of responses, as a piece of work of the fleet."""

    shard: ResponseShard
    units: ResponseUnits

    @property
    def name(self) -> str:
        """What its lease is called."""
        return self.shard.name

    def is_done(self, _: Store) -> bool:
        """Return whether its file and its unit are there."""
        return self.units.is_done(self.shard)


class _ResponsePool:
    """The shards of the prompts that are known."""

    def __init__(
        self, task: WritingTask, units: ResponseUnits, board: LeaseBoard, progress: Progress
    ) -> None:
        self._prompts = task.prompts
        self._task = task
        self._units = units
        self._board = board
        self._progress = progress
        self._before: set[int] | None = None
        """What was there when this worker came, and is not counted yet."""

    def missing(self, *, look: bool = True) -> list[_ResponseWork]:
        """Return the shards without a file or a unit, by two listings."""
        if look:
            self._prompts.refresh()
        there, names = self._units.there()
        self._progress.retarget(_responses(self._task))
        self._count_before(there)
        shards = self._prompts.shards
        fold_summaries(self._units.folder, names, len(shards), self._board)
        return [_ResponseWork(s, self._units) for s in shards if s.index not in there]

    def _count_before(self, there: set[int]) -> None:
        """Count what was there when this worker came, once its prompts are known."""
        if self._before is None:
            self._before = set(there)
        known = [shard for shard in self._prompts.shards if shard.index in self._before]
        self._before.difference_update(shard.index for shard in known)
        each = self._task.plan.settings.responses
        self._progress.count_before(sum(shard.num_prompts for shard in known) * each)

    @property
    def total(self) -> int:
        """The shards that are known."""
        return len(self._prompts.shards)

    @property
    def is_complete(self) -> bool:
        """Whether all prompts are known."""
        return self._prompts.is_complete


class _Writer:
    """Writes one shard after the other; the generator is opened at the first."""

    def __init__(
        self,
        task: WritingTask,
        units: ResponseUnits,
        board: LeaseBoard,
        progress: Progress,
        pulse: Pulse,
    ) -> None:
        self._task = task
        self._units = units
        self._board = board
        self._pulse = pulse
        self._store = board.store
        self._progress = progress
        self._generator: Generator | None = None
        self.written: list[ResponseShard] = []
        """The files that this worker created."""

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._board.give_up_all()
        if self._generator is not None:
            self._generator.close()

    def make(self, work: _ResponseWork, lease: Lease) -> None:
        """Write the file and the unit of a shard, as far as they are missing."""
        shard, units = work.shard, self._units
        prompts = self._task.prompts.prompts(shard)
        found = units.read(shard, prompts)
        if isinstance(found, Lacking):
            found = self._new_file(shard, prompts, self._marker(shard, lease))
        else:
            self._progress.advance(shard.num_prompts * self._task.plan.settings.responses)
        units.commit(shard, prompts, found.tokens)
        self._board.done(lease)

    def _marker(self, shard: ResponseShard, lease: Lease) -> InFlightMarker | None:
        """Return the in-flight marker of a shard that has taken processes with it."""
        tries = self._task.settings.tries
        if lease.attempt < tries or self._board.bad_ends(lease) < tries:
            return None
        _log.warning(
            "%s: %d attempts ended badly; prompt after prompt now", shard.name, lease.attempt
        )
        return InFlightMarker(self._store, shard.name)

    def _new_file(
        self, shard: ResponseShard, prompts: Sequence[Sample], marker: InFlightMarker | None
    ) -> ReadResponses:
        """Let the teacher answer, and write the file; return what is in it."""
        requests = self._task.plan.requests(prompts)
        written = self._write(shard, requests, marker)
        self._check_vocabulary(requests, written)
        empty = np.zeros(0, np.int32)
        tokens = [one.token_ids_N if isinstance(one, Written) else empty for one in written]
        if isinstance(self._units.read(shard, prompts), Lacking):
            self._units.check_again(shard, prompts, tokens, self._board)
            reopen_responses(self._store, self._task)
        there = self._units.read_or_remove(shard, prompts)
        if there is not None:
            _log.info("%s was written by another worker; its tokens count", shard.name)
            return there
        data = encode_responses(
            self._texts(prompts, requests, written),
            written,
            identity_digest=fingerprint(self._task.identity),
            prompts=prompts_digest(prompts),
        )
        if self._store.create(shard.file, data):
            self.written.append(shard)
        found = self._units.read(shard, prompts)  # of this worker, or of one that was faster
        if isinstance(found, Lacking):
            raise CacheError(
                f"{self._store.full_url(shard.file)}: damaged as soon as it was written",
                do="look after the store; the same command goes on",
            )
        return found

    def _write(
        self, shard: ResponseShard, requests: Sequence[WriteRequest], marker: InFlightMarker | None
    ) -> list[Written | QuarantinedRow]:
        """Let the teacher answer a shard's prompts."""
        if self._generator is None:
            with self._pulse.expecting(loading=True):
                self._generator = WatchedGenerator(self._open_generator(), self._pulse)
        started = time.monotonic()
        written = write_or_quarantine(
            self._generator,
            requests,
            tries=self._task.settings.tries,
            marker=marker,
            on_responses=self._progress.advance,
        )
        seconds = time.monotonic() - started
        tokens = sum(int(w.token_ids_N.size) for w in written if isinstance(w, Written))
        _log.info(
            "%s: %d tokens written in %.1f s (%.0f tokens/s)",
            shard.name, tokens, seconds, tokens / max(seconds, 1e-9),
        )  # fmt: skip
        return written

    def _open_generator(self) -> Generator:
        writer, plan = self._task.writer, self._task.plan
        return open_generator(
            writer.settings,
            plan.settings,
            folder=writer.model.path,
            ends=plan.ends,
            vocabulary=plan.vocabulary,
            max_length=self._task.teacher.max_length,
        )

    def _check_vocabulary(
        self, requests: Sequence[WriteRequest], written: Sequence[Written | QuarantinedRow]
    ) -> None:
        vocabulary = self._task.plan.vocabulary
        for request, response in zip(requests, written, strict=True):
            if isinstance(response, QuarantinedRow):
                continue
            largest = int(response.token_ids_N.max())
            if not 0 <= response.token_ids_N.min() <= largest < vocabulary:
                raise ModelError(
                    f"{self._task.writer.called} wrote token {largest} in response "
                    f"{request.response_id}, which its tokenizer does not have",
                    expected=f"ids below {vocabulary}",
                    do="check that tokenizer and weights belong together, or lower "
                    "--generate.temperature",
                )

    def _texts(
        self,
        prompts: Sequence[Sample],
        requests: Sequence[WriteRequest],
        written: Sequence[Written | QuarantinedRow],
    ) -> list[ResponseText]:
        plan = self._task.plan
        decode = partial(self._task.teacher.tokenizer.decode, skip_special_tokens=False)
        owners = [prompt for prompt in prompts for _ in range(plan.settings.responses)]
        ids = [one.token_ids_N.tolist() if isinstance(one, Written) else [] for one in written]
        return [
            ResponseText(
                response_id=request.response_id,
                split=prompt.split,
                prompt=decode(prompt.input_ids.tolist()),
                response=decode(tokens),
                finished=bool(tokens) and tokens[-1] in plan.ends,
            )
            for request, prompt, tokens in zip(requests, owners, ids, strict=True)
        ]
