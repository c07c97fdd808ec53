"""The teacher writes the responses: shards of prompts, claimed by any number of workers.

A response file is created once and never replaced, so all workers go on from the same tokens even
where two of them, both alive, wrote the same shard. Only when all files are there is the corpus
known, and with it the cache's identity and plan; until then the folder belongs to the identity as
far as it can be known, which is written first and refuses everybody else at once.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from pipeline.cache.layout.manifest import RESPONSES
from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.errors import CacheError, ModelError
from pipeline.observe.progress import Progress
from pipeline.storage import Store
from pipeline.teacher.capture.plan import make_plan
from pipeline.teacher.capture.run import Prepared
from pipeline.teacher.fleet.leases import ClaimBoard, worker_name
from pipeline.teacher.generation.base import Generator, WriteRequest, Written, open_generator
from pipeline.teacher.generation.files import (
    ReadResponses,
    ResponseText,
    decode_responses,
    encode_responses,
    file_name,
)
from pipeline.teacher.generation.identity import (
    planned_cache,
    refuse_written_responses,
    settle_responses,
)
from pipeline.teacher.generation.plan import ResponsePlan, ResponseShard
from pipeline.teacher.generation.unanswered import write_patiently
from pipeline.teacher.settings import CaptureSettings, TeacherSettings

__all__ = ["responses_done", "with_responses", "write_responses"]

_log = logging.getLogger(__name__)


def write_responses(
    prepared: Prepared,
    teacher: TeacherSettings,
    capture: CaptureSettings,
    *,
    store: Store,
    max_length: int,
    progress_every_s: float,
) -> Prepared:
    """Write what is missing of the responses; return the run with its corpus, identity and plan.

    A run without generation passes through. One that finds every response loads no teacher. The
    generator is closed before this returns: the device is free for the capture.

    Raises:
        CacheError: the store holds a cache, or the start of one, of another identity.
        ModelError: the teacher answers no prompt of a shard, or too few in all.
    """
    plan = prepared.responses
    if plan is None:
        refuse_written_responses(store, prepared)
        return prepared
    settle_responses(store, prepared, plan)
    shards = plan.shards()
    done = responses_done(plan, store)
    open_teacher = partial(
        open_generator,
        teacher,
        plan.settings,
        folder=prepared.model.path,
        ends=plan.ends,
        vocabulary=plan.vocabulary,
        max_length=max_length,
    )
    board = ClaimBoard(store, worker_name(), capture.lease_s)
    with (
        Progress(
            plan.total,
            unit="responses",
            description="teacher writes",
            every_s=progress_every_s,
            initial=done,
            enabled=done < plan.total,
        ) as progress,
        board.beating(),
        _Writer(prepared, plan, store, open_teacher, progress, capture.tries) as writer,
    ):
        try:
            while True:
                _write_all(shards, store, board, writer)
                files = _read_all(shards, plan, prepared, store)
                if files is not None:
                    break
        finally:
            board.give_up_all()
    _check_share(files, plan, capture.max_failed_fraction, store)
    return _with_files(prepared, plan, files, store, shard_tokens=capture.shard_tokens)


def with_responses(prepared: Prepared, *, store: Store, shard_tokens: int) -> Prepared:
    """Return the run with its corpus where every response is there, else unchanged; for dry runs.

    Raises:
        CacheError: the responses there are not those of the cache beside them.
    """
    plan = prepared.responses
    if plan is None or responses_done(plan, store) < plan.total:
        return prepared
    files: list[ReadResponses] = []
    for shard in plan.shards():
        found = _read(shard, plan, prepared, store)
        if found is None:
            return prepared
        files.append(found)
    return _with_files(prepared, plan, files, store, shard_tokens=shard_tokens)


def responses_done(plan: ResponsePlan, store: Store) -> int:
    """Return how many responses lie in finished files, by one listing."""
    present = set(store.list(RESPONSES))
    return sum(
        len(shard.prompts) * plan.settings.responses
        for shard in plan.shards()
        if _base_name(shard) in present
    )


class _Writer:
    """Writes one shard after the other; the generator is opened at the first."""

    def __init__(
        self,
        prepared: Prepared,
        plan: ResponsePlan,
        store: Store,
        open_teacher: Callable[[], Generator],
        progress: Progress,
        tries: int,
    ) -> None:
        self._prepared = prepared
        self._plan = plan
        self._store = store
        self._open_teacher = open_teacher
        self._progress = progress
        self._tries = tries
        self._generator: Generator | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._generator is not None:
            self._generator.close()

    def write(self, shard: ResponseShard) -> None:
        """Let the teacher answer a shard's prompts and create its file."""
        if self._generator is None:
            self._generator = self._open_teacher()
        started = time.monotonic()
        requests = self._plan.requests(shard.prompts)
        written = write_patiently(
            self._generator, requests, tries=self._tries, on_responses=self._progress.advance
        )
        answered = [one for one in written if not isinstance(one, QuarantinedRow)]
        tokens = sum(int(response.token_ids_N.size) for response in answered)
        seconds = time.monotonic() - started
        _log.info(
            "%s: %d tokens written in %.1f s (%.0f tokens/s)",
            shard.name, tokens, seconds, tokens / max(seconds, 1e-9),
        )  # fmt: skip
        for request, response in zip(requests, written, strict=True):
            if isinstance(response, QuarantinedRow):
                continue
            largest = int(response.token_ids_N.max())
            if not 0 <= response.token_ids_N.min() <= largest < self._plan.vocabulary:
                raise ModelError(
                    f"the teacher wrote token {largest} in response {request.response_id}, which "
                    "its tokenizer does not have",
                    expected=f"ids below {self._plan.vocabulary}",
                    do="check that tokenizer and weights belong together, or lower "
                    "--generate.temperature",
                )
        texts = self._texts(shard, requests, written)
        digest = self._prepared.identity_digest
        data = encode_responses(texts, written, identity_digest=digest)
        if not self._store.create(file_name(shard.index), data):
            _log.info("%s was written by another worker meanwhile; its tokens count", shard.name)

    def _texts(
        self,
        shard: ResponseShard,
        requests: Sequence[WriteRequest],
        written: Sequence[Written | QuarantinedRow],
    ) -> list[ResponseText]:
        decode = partial(self._prepared.tokenizer.decode, skip_special_tokens=False)
        each = self._plan.settings.responses
        prompts = [prompt for prompt in shard.prompts for _ in range(each)]
        ids = [
            [] if isinstance(one, QuarantinedRow) else one.token_ids_N.tolist() for one in written
        ]
        return [
            ResponseText(
                response_id=request.response_id,
                split=prompt.split,
                prompt=decode(prompt.input_ids.tolist()),
                response=decode(tokens),
                finished=bool(tokens) and tokens[-1] in self._plan.ends,
            )
            for request, prompt, tokens in zip(requests, prompts, ids, strict=True)
        ]


def _write_all(
    shards: Sequence[ResponseShard],
    store: Store,
    board: ClaimBoard,
    writer: _Writer,
    *,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Claim and write shards until every file is there, whoever wrote it."""
    start = zlib.crc32(board.worker.encode()) % max(len(shards), 1)
    ordered = [*shards[start:], *shards[:start]]
    while True:
        present = set(store.list(RESPONSES))
        missing = [shard for shard in ordered if _base_name(shard) not in present]
        if not missing:
            return
        newest = board.attempts()
        claimed_any = False
        for shard in missing:
            claim = board.try_claim(shard.name, newest.get(shard.name))
            if claim is None:
                continue
            claimed_any = True
            # Between the listing and the claim another worker may have finished it.
            if not store.exists(file_name(shard.index)):
                if claim.attempt:
                    _log.warning("taking over %s, attempt %d", shard.name, claim.attempt + 1)
                writer.write(shard)
            board.done(claim)
        if not claimed_any:
            _log.debug("%d shards of responses are in other workers' hands", len(missing))
            wait(min(5.0, board.lease_s / 10))


def _read_all(
    shards: Sequence[ResponseShard], plan: ResponsePlan, prepared: Prepared, store: Store
) -> list[ReadResponses] | None:
    """Return all files of responses; None after damaged files were removed."""
    files: list[ReadResponses] = []
    damaged = False
    for shard in shards:
        found = _read(shard, plan, prepared, store)
        if found is None:
            name = file_name(shard.index)
            _log.warning("%s: damaged or missing; written again", store.full_url(name))
            store.delete(name)
            damaged = True
        else:
            files.append(found)
    return None if damaged else files


def _read(
    shard: ResponseShard, plan: ResponsePlan, prepared: Prepared, store: Store
) -> ReadResponses | None:
    names = [request.response_id for request in plan.requests(shard.prompts)]
    try:
        data = store.read(file_name(shard.index))
    except FileNotFoundError:
        return None
    return decode_responses(data, response_ids=names, identity_digest=prepared.identity_digest)


def _check_share(
    files: Sequence[ReadResponses], plan: ResponsePlan, most: float, store: Store
) -> None:
    """Refuse to go on to the capture when too many responses are lacking."""
    count = sum(len(file.unanswered) for file in files)
    allowed = max(1, math.floor(most * plan.total))
    if count > allowed:
        lacking = [file_name(index) for index, file in enumerate(files) if file.unanswered]
        last = files[int(lacking[-1].rsplit("/", 1)[-1].split(".")[0])].unanswered[-1]
        shown = ", ".join(lacking[:3]) + (" ..." if len(lacking) > 3 else "")
        raise ModelError(
            f"{store.url}: {count} of {plan.total} responses could not be written, the last of "
            f"them {last.sample_id}: {last.error}",
            expected=f"at most {allowed} (capture.max_failed_fraction)",
            do=f"mend the teacher, delete {shown} and run the same command again, or allow more; "
            "the other responses are kept",
        )


def _with_files(
    prepared: Prepared,
    plan: ResponsePlan,
    files: Sequence[ReadResponses],
    store: Store,
    *,
    shard_tokens: int,
) -> Prepared:
    corpus = plan.corpus([tokens_N for file in files for tokens_N in file.tokens])
    written = corpus.identity["responses"]
    _log.info(
        "responses: %d, %d tokens, %d of them cut off at %d tokens",
        written["count"], written["tokens"], written["unfinished"], plan.settings.max_new_tokens,
    )  # fmt: skip
    identity = {**prepared.identity, "corpus": corpus.identity}
    planned = planned_cache(store)
    if planned is not None and planned.as_begun == prepared.identity:
        found = planned.identity["corpus"]["responses"]
        if found != written:
            raise CacheError(
                f"{store.url}: responses that were lost and written again came out otherwise "
                f"({found['tokens']} tokens before, {written['tokens']} now), and the shards there "
                "are made from the old ones",
                expected=f"the files of {RESPONSES} as they were",
                do="bring them back, or delete that cache",
            )
    return replace(
        prepared,
        corpus=corpus,
        identity=identity,
        plan=make_plan(corpus.samples, shard_tokens=shard_tokens),
        responses=None,
        unanswered={
            shard.name: file.unanswered
            for shard, file in zip(plan.shards(), files, strict=True)
            if file.unanswered
        },
    )


def _base_name(shard: ResponseShard) -> str:
    return file_name(shard.index).rsplit("/", 1)[-1]
