"""The teacher writes the responses: shards of prompts, leased by any number of workers.

A response file is created once and never replaced, so all workers go on from the same tokens even
where two of them, both alive, wrote the same shard. Only when all files are there is the corpus
known, and with it the cache's identity and plan; until then the folder belongs to the identity as
far as it can be known, which is written first and rejects everybody else at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial

from pipeline.cache.layout.names import RESPONSES
from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.config import fingerprint
from pipeline.errors import ModelError
from pipeline.observe.shares import Shares
from pipeline.progress import Progress
from pipeline.storage import Store
from pipeline.teacher.fleet.leases import LeaseBoard
from pipeline.teacher.fleet.processes import worker_name
from pipeline.teacher.fleet.queue import leased_work
from pipeline.teacher.generation.base import Generator, WriteRequest, Written
from pipeline.teacher.generation.files import ResponseText, encode_responses
from pipeline.teacher.generation.identity import RESPONSE_PLAN, settle_responses
from pipeline.teacher.generation.plan import ResponseShard, WritingTask
from pipeline.teacher.generation.quarantine import write_or_quarantine
from pipeline.teacher.generation.read import (
    Responses,
    check_limit,
    read_files,
    responses_done,
    to_responses,
)
from pipeline.teacher.generation.registry import open_generator

__all__ = ["RESPONSES_LOST", "has_responses", "write_responses"]

RESPONSES_LOST = "responses_quarantined"
"""Among a cache's counts: the responses that the teacher could not write."""


_log = logging.getLogger(__name__)


def write_responses(task: WritingTask, *, store: Store, progress_every_s: float) -> Responses:
    """Write what is missing of the responses and return all.

    A run that finds every response loads no teacher. The generator is closed before this returns:
    the device is free for the capture.

    Raises:
        CacheError: the store holds a cache, or the start of one, of another identity.
        ModelError: the teacher answers no prompt of a shard, or too few in all.
    """
    settle_responses(store, task)
    done = responses_done(task.plan, store)
    board = LeaseBoard(store, worker_name(), task.settings.lease_s)
    progress = Progress(
        task.plan.total,
        unit="responses",
        description="teacher writes",
        every_s=progress_every_s,
        initial=done,
        enabled=done < task.plan.total,
    )
    with progress, board.beating(), _Writer(task, board, progress) as writer:
        files = None
        while files is None:
            writer.run()
            files = read_files(task, store)
    check_limit(files, task, store)
    return to_responses(files, task, store)


def has_responses(task: WritingTask, store: Store) -> bool:
    """Return whether the plan and every file of responses are there, by two requests."""
    return store.exists(RESPONSE_PLAN) and responses_done(task.plan, store) == task.plan.total


class _ResponsePool:
    """The shards of responses; all are known."""

    def __init__(self, shards: Sequence[ResponseShard], store: Store) -> None:
        self._shards = shards
        self._store = store

    def missing(self) -> list[ResponseShard]:
        """Return the shards without a file, by one listing."""
        done = set(self._store.list(RESPONSES))
        return [shard for shard in self._shards if shard.file_name not in done]

    @property
    def total(self) -> int:
        """All."""
        return len(self._shards)

    @property
    def is_complete(self) -> bool:
        """No further shards come."""
        return True


class _Writer:
    """Writes one shard after the other; the generator is opened at the first."""

    def __init__(self, task: WritingTask, board: LeaseBoard, progress: Progress) -> None:
        self._task = task
        self._board = board
        self._store = board.store
        self._progress = progress
        self._generator: Generator | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._board.give_up_all()
        if self._generator is not None:
            self._generator.close()

    def run(self) -> None:
        """Lease and write shards until every file is there, whoever wrote it."""
        pool = _ResponsePool(self._task.plan.shards(), self._store)
        for shard, lease in leased_work(pool, self._board, shares=Shares()):
            requests = self._task.plan.requests(shard.prompts)
            written = self._write(shard, requests)
            self._check_vocabulary(requests, written)
            data = encode_responses(
                self._texts(shard, requests, written),
                written,
                identity_digest=fingerprint(self._task.identity),
            )
            if not self._store.create(shard.file, data):
                _log.info("%s was written by another worker; its tokens count", shard.name)
            self._board.done(lease)

    def _write(
        self, shard: ResponseShard, requests: Sequence[WriteRequest]
    ) -> list[Written | QuarantinedRow]:
        """Let the teacher answer a shard's prompts."""
        if self._generator is None:
            self._generator = self._open_generator()
        started = time.monotonic()
        written = write_or_quarantine(
            self._generator,
            requests,
            tries=self._task.settings.tries,
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
        teacher, plan = self._task.teacher, self._task.plan
        return open_generator(
            teacher.settings,
            plan.settings,
            folder=teacher.model.path,
            ends=plan.ends,
            vocabulary=plan.vocabulary,
            max_length=teacher.max_length,
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
                    f"the teacher wrote token {largest} in response {request.response_id}, which "
                    "its tokenizer does not have",
                    expected=f"ids below {vocabulary}",
                    do="check that tokenizer and weights belong together, or lower "
                    "--generate.temperature",
                )

    def _texts(
        self,
        shard: ResponseShard,
        requests: Sequence[WriteRequest],
        written: Sequence[Written | QuarantinedRow],
    ) -> list[ResponseText]:
        plan = self._task.plan
        decode = partial(self._task.teacher.tokenizer.decode, skip_special_tokens=False)
        prompts = [prompt for prompt in shard.prompts for _ in range(plan.settings.responses)]
        ids = [one.token_ids_N.tolist() if isinstance(one, Written) else [] for one in written]
        return [
            ResponseText(
                response_id=request.response_id,
                split=prompt.split,
                prompt=decode(prompt.input_ids.tolist()),
                response=decode(tokens),
                finished=bool(tokens) and tokens[-1] in plan.ends,
            )
            for request, prompt, tokens in zip(requests, prompts, ids, strict=True)
        ]
