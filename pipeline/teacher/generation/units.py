"""What responses become: the samples of a shard of them, kept as a unit of a prepared corpus.

So the capture reads them as it reads any corpus: shards from summaries, tokens of what it captures.
A unit is made from the file of its responses and from its prompts, by whoever finds it missing.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from functools import partial

from pipeline.cache.layout.manifest import Manifest
from pipeline.cache.layout.names import (
    RECORDS,
    RESPONSE_UNITS,
    RESPONSES,
    SegmentName,
    response_name,
)
from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.cache.layout.recorded import Recorded
from pipeline.cache.layout.records import ShardRecord, decode_segment
from pipeline.config import fingerprint
from pipeline.corpus.prepared.blocks import TokenisedRow
from pipeline.corpus.prepared.folder import PreparedFolder
from pipeline.corpus.prepared.summary import (
    BlockSummary,
    CorpusSummary,
    UnitReport,
    UnitSummary,
)
from pipeline.corpus.prepared.units import Unit
from pipeline.corpus.prepared.view import CorpusView
from pipeline.corpus.sample import CorpusCounts, Sample
from pipeline.corpus.samples import Block, hashed_row
from pipeline.corpus.split import DecidedSplit
from pipeline.errors import CacheError, ModelError
from pipeline.storage import Store
from pipeline.storage.parallel import in_threads
from pipeline.teacher.capture.plan import folder_identity
from pipeline.teacher.capture.source import PreparedShards
from pipeline.teacher.fleet.leases import LeaseBoard
from pipeline.teacher.generation.base import Written
from pipeline.teacher.generation.files import (
    ReadResponses,
    decode_responses,
    prompts_digest,
    written_files,
)
from pipeline.teacher.generation.plan import ResponsePlan, WritingTask, response_sample
from pipeline.teacher.generation.shards import ResponseShard
from pipeline.teacher.preparation.work import forget_unit

__all__ = ["RESPONSES_LOST", "Lacking", "ResponseUnits", "ResponsesLost", "response_unit"]

RESPONSES_LOST = "responses_quarantined"
"""Among the counts: the responses that the teacher could not write."""
_READS_AT_ONCE = 16
_READS = 2
"""A bit flipped in transfer is right at the second read; one flipped on the disk is not."""

_log = logging.getLogger(__name__)


class Lacking(Enum):
    """Why a file of responses cannot be read."""

    MISSING = "missing"
    DAMAGED = "damaged"


class ResponsesLost(CacheError):
    """A file of responses is missing, and so is what was made from it: it is to be written again.

    What is known of the old ones says then whether the new ones are the same.
    """


def response_unit(
    index: int,
    prompts: Sequence[Sample],
    responses: Sequence[Written],
    plan: ResponsePlan,
) -> tuple[Block, UnitSummary]:
    """Return the samples of a shard and their summary; a pure function of its arguments.

    Args:
        index: of the shard.
        prompts: of the shard.
        responses: every response, in the order of `plan.requests`; without tokens where there is
            none: such a response is no sample.
        plan: how prompts are answered.
    """
    block, report = Block(BlockSummary(0)), UnitReport(rows=len(prompts))
    content = hashlib.blake2b(digest_size=16)
    written = iter(responses)
    for row, prompt in enumerate(prompts):
        content.update(prompt.input_ids.astype("<i4").tobytes())
        samples: list[TokenisedRow] = []
        for number, name in enumerate(plan.names(prompt)):
            response = next(written)
            ids_N = response.token_ids_N
            content.update(name.encode() + ids_N.astype("<i4").tobytes())
            if not ids_N.size:
                report.counts[RESPONSES_LOST] = report.counts.get(RESPONSES_LOST, 0) + 1
                continue
            report.turns += 1
            report.unended += int(ids_N[-1]) not in plan.ends
            if response.logprobs_N is not None:
                content.update(response.logprobs_N.astype("<f4").tobytes())
            if response.top_ids_NK is not None:
                content.update(response.top_ids_NK.astype("<i4").tobytes())
            made = response_sample(prompt, name, number, ids_N, response.recorded)
            samples.append(
                TokenisedRow(name, row, number, made.input_ids, made.loss_mask, made.written)
            )
        if samples:
            _add(block, prompt, row, samples)
    report.content = content.hexdigest()
    return block, UnitSummary(index, report, [block.summary])


def _add(block: Block, prompt: Sample, row: int, samples: list[TokenisedRow]) -> None:
    sums = hashed_row(0, row, samples)
    block.summary.rows += 1
    if prompt.split == "heldout":
        block.summary.candidates.append(sums)
        block.candidates += samples
    else:
        block.summary.train.add(sums.totals)
        block.train += samples


class ResponseUnits:
    """The units of all responses of one cache."""

    def __init__(self, task: WritingTask, store: Store, *, only_look: bool = False) -> None:
        """Look at nothing yet.

        Args:
            task: what is written.
            store: the cache's root.
            only_look: repair nothing there.
        """
        self._task = task
        self._store = store
        self._only_look = only_look
        folder = PreparedFolder(Store(store.full_url(RESPONSE_UNITS)))
        self.folder = folder.only_read() if only_look else folder

    def there(self) -> tuple[set[int], list[str]]:
        """Return the shards with a file and a unit, and the summaries' files, by two listings."""
        done, names = self.folder.done()
        files = written_files(self._store)
        return {n for n in done if response_name(n) in files}, names

    def is_done(self, shard: ResponseShard) -> bool:
        """Return whether a shard has its file and its unit."""
        return shard.index in self.folder.done()[0] and self._store.exists(shard.file)

    def read(self, shard: ResponseShard, prompts: Sequence[Sample]) -> ReadResponses | Lacking:
        """Return the responses of a shard, or why there are none.

        Raises:
            CacheError: its file is intact, and another cache's, or answers other prompts.
        """
        names = [name for prompt in prompts for name in self._task.plan.names(prompt)]
        for _ in range(_READS):
            try:
                data = self._store.read(shard.file)
            except FileNotFoundError:
                return Lacking.MISSING
            found = decode_responses(
                data,
                where=self._store.full_url(shard.file),
                response_ids=names,
                identity_digest=fingerprint(self._task.identity),
                prompts=prompts_digest(prompts),
            )
            if found is not None:
                return found
        return Lacking.DAMAGED

    def read_or_remove(
        self, shard: ResponseShard, prompts: Sequence[Sample]
    ) -> ReadResponses | None:
        """Return the responses of a shard, or None where there is no file now.

        A file is removed only where its bytes have just been seen to be damaged: one that was
        missing a moment ago may be another worker's now.

        Raises:
            CacheError: as `read`.
        """
        found = self.read(shard, prompts)
        if found is Lacking.DAMAGED:
            _log.warning("%s: damaged; written again", self._store.full_url(shard.file))
            self._store.delete(shard.file)
        return None if isinstance(found, Lacking) else found

    def commit(
        self,
        shard: ResponseShard,
        prompts: Sequence[Sample],
        responses: Sequence[Written],
    ) -> UnitSummary:
        """Write the unit of a shard; its summary is the last."""
        block, summary = response_unit(shard.index, prompts, responses, self._task.plan)
        block.summary.checksums = self.folder.write_block(
            shard.index, 0, (block.train, block.candidates)
        )
        self.folder.commit(summary)
        return summary

    def check_again(
        self,
        shard: ResponseShard,
        prompts: Sequence[Sample],
        responses: Sequence[Written],
        board: LeaseBoard,
    ) -> None:
        """Compare responses that are written again with the unit of those that were lost.

        Before the capture has begun it does not matter: the unit is forgotten.

        Raises:
            CacheError: they are others.
        """
        if folder_identity(self._store) is None:
            if self.folder.files_of(shard.index):
                forget_unit(self.folder, shard.index, board)
            return
        old = self.folder.summary_of(shard.index)
        _, new = response_unit(shard.index, prompts, responses, self._task.plan)
        if old is not None and new.report.content != old.report.content:
            raise self._otherwise(shard.file)

    def check_captured(
        self, view: CorpusView, manifest: Manifest | None, written: Sequence[ResponseShard]
    ) -> None:
        """Compare all responses with what the shards there are made from, units lost or not.

        Args:
            view: of all responses.
            manifest: of a complete cache.
            written: what this worker wrote just now, which goes again where it is of no use. So
                do all units: those of files that are brought back are made again.

        Raises:
            CacheError: they are others.
        """
        same = True
        if manifest is not None:
            same = view.report.content == manifest.corpus_content
        elif names := Recorded(self._store.list(RECORDS)).segments:
            source = self.source(view)
            source.refresh()
            planned = {shard.key: shard.source.source_xxh3_128 for shard in source.shards}
            same = all(
                record.source_xxh3_128 in ("", planned.get(record.key))
                for record in self._records(names)
            )
        if same:
            return
        for shard in written:
            self._store.delete(shard.file)
        self.folder.remove()
        raise self._otherwise(*(shard.file for shard in written))

    def _records(self, names: Sequence[SegmentName]) -> Iterator[ShardRecord]:
        def read_one(name: SegmentName) -> list[ShardRecord]:
            with suppress(FileNotFoundError):  # folded meanwhile
                return decode_segment(self._store.read(name.path), name) or []
            return []

        for records in in_threads(read_one, names, _READS_AT_ONCE):
            yield from records

    def _otherwise(self, *files: str) -> CacheError:
        where = ", ".join(map(self._store.full_url, files)) or self._store.full_url(RESPONSES)
        return CacheError(
            f"{where}: responses that were lost and written again came out otherwise, and the "
            "shards there are made from the old ones",
            expected=f"the files of {RESPONSES} as they were",
            do="bring them back, or delete that cache",
        )

    def remove_damaged(self) -> None:
        """Read every file of responses and remove the damaged ones: they are written again."""
        for shard in self._task.prompts.shards:
            if self._store.exists(shard.file):
                self.read_or_remove(shard, self._task.prompts.prompts(shard))

    def view(self) -> CorpusView:
        """Return what is known of the responses, once all prompts are known."""
        count = len(self._task.prompts.shards)
        units = [Unit(index, ()) for index in range(count)]
        view = CorpusView(self.folder, units, DecidedSplit(), self._make_again)
        view.refresh()
        return view

    def source(self, view: CorpusView) -> PreparedShards:
        """Return the shards to capture."""
        conclude = partial(_conclude, prompts=self._task.prompts.counts(), plan=self._task.plan)
        return PreparedShards(lambda: view, self._task.settings.shard_tokens, conclude=conclude)

    def quarantined(self, view: CorpusView) -> Mapping[str, tuple[QuarantinedRow, ...]]:
        """Return the responses that the teacher could not write, by shard of responses."""
        if not view.report.counts.get(RESPONSES_LOST):
            return {}
        lacks: dict[int, bool] = {}
        for _, summaries in self.folder.read(self.folder.done()[1]):
            lacks |= {s.index: bool(s.report.counts.get(RESPONSES_LOST)) for s in summaries}
        found: dict[str, tuple[QuarantinedRow, ...]] = {}
        for index in sorted(index for index, is_lacking in lacks.items() if is_lacking):
            shard = self._task.prompts.shards[index]
            file = self.read(shard, self._task.prompts.prompts(shard))
            found[shard.name] = () if isinstance(file, Lacking) else file.quarantined
        return found

    def check_limit(self, view: CorpusView) -> None:
        """Stop before the capture when too many responses are quarantined.

        Raises:
            ModelError: they are more than `capture.max_quarantined_fraction`.
        """
        count, task = view.report.counts.get(RESPONSES_LOST, 0), self._task
        total = task.prompts.counts().samples * task.plan.settings.responses
        allowed = max(1, math.floor(task.settings.max_quarantined_fraction * total))
        if count <= allowed:
            return
        lacking = self.quarantined(view)
        files = {shard.name: shard.file for shard in task.prompts.shards}
        named = ", ".join(files[name] for name in lacking)
        last = next((rows[-1] for rows in reversed([*lacking.values()]) if rows), None)
        why = "" if last is None else f", the last of them {last.sample_id}: {last.error}"
        raise ModelError(
            f"{self._store.url}: {count} of {total} responses could not be written{why}",
            expected=f"at most {allowed} (capture.max_quarantined_fraction)",
            do=f"mend the teacher, delete {named} and run the same command again, or allow "
            "more; the other responses are kept",
        )

    def _make_again(self, unit: Unit) -> None:
        """Make a damaged unit from the file of its responses.

        Raises:
            ResponsesLost: that is damaged as well, and removed now, or missing.
        """
        shard = self._task.prompts.shards[unit.index]
        prompts = self._task.prompts.prompts(shard)
        found = self.read(shard, prompts)
        if isinstance(found, Lacking):
            if not self._only_look:
                self.read_or_remove(shard, prompts)
            raise ResponsesLost(
                f"{self._store.full_url(shard.file)}: {found.value}, and what was made from it is "
                "damaged",
                do="run the same command again: they are written again, and compared with the old",
            )
        self.commit(shard, prompts, found.written)
        self._task.prompts.release()


def _conclude(found: CorpusSummary, *, prompts: CorpusCounts, plan: ResponsePlan) -> CorpusCounts:
    """Log what was written; return the counts of the corpus."""
    _log.info(
        "responses: %d, %d tokens, %d of them cut off at %d tokens",
        found.report.turns, found.train.loss_tokens + found.heldout.loss_tokens,
        found.report.unended, plan.settings.max_new_tokens,
    )  # fmt: skip
    return replace(
        prompts,
        samples=found.train.samples + found.heldout.samples,
        train=found.train.samples,
        heldout=found.heldout.samples,
        tokens=found.train.tokens + found.heldout.tokens,
        loss_tokens=found.train.loss_tokens + found.heldout.loss_tokens,
    )
