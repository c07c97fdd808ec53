"""What responses become: the samples of a shard of them, kept as a unit of a prepared corpus.

So the capture reads them as it reads any corpus: shards from summaries, tokens of what it captures.
A unit is made from the file of its responses and from its prompts, by whoever finds it missing.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.layout.names import RESPONSE_UNITS, RESPONSES
from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.config import fingerprint
from pipeline.corpus.prepared.blocks import TokenisedRow
from pipeline.corpus.prepared.folder import PreparedFolder
from pipeline.corpus.prepared.summary import (
    BlockSummary,
    CorpusSummary,
    HashedRow,
    UnitReport,
    UnitSummary,
)
from pipeline.corpus.prepared.units import Unit
from pipeline.corpus.prepared.view import CorpusView
from pipeline.corpus.sample import CorpusCounts, Sample
from pipeline.corpus.samples import Block
from pipeline.corpus.split import DecidedSplit
from pipeline.errors import CacheError, ModelError
from pipeline.storage import Store
from pipeline.teacher.capture.plan import folder_identity
from pipeline.teacher.capture.source import PreparedShards
from pipeline.teacher.generation.files import ReadResponses, decode_responses
from pipeline.teacher.generation.plan import ResponsePlan, WritingTask, response_sample
from pipeline.teacher.generation.shards import ResponseShard

__all__ = ["RESPONSES_LOST", "ResponseUnits", "response_unit"]

RESPONSES_LOST = "responses_quarantined"
"""Among the counts: the responses that the teacher could not write."""
_SHOWN = 3

_log = logging.getLogger(__name__)


def response_unit(
    index: int,
    prompts: Sequence[Sample],
    responses_RN: Sequence[NDArray[np.int32]],
    plan: ResponsePlan,
) -> tuple[Block, UnitSummary]:
    """Return the samples of a shard and their summary; a pure function of its arguments.

    Args:
        index: of the shard.
        prompts: of the shard.
        responses_RN: the sampled tokens of every response, in the order of `plan.requests`; empty
            where there is none: such a response is no sample.
        plan: how prompts are answered.
    """
    block, report = Block(BlockSummary(0)), UnitReport(rows=len(prompts))
    content = hashlib.blake2b(digest_size=16)
    written = iter(responses_RN)
    for row, prompt in enumerate(prompts):
        content.update(prompt.input_ids.astype("<i4").tobytes())
        samples: list[TokenisedRow] = []
        for number, name in enumerate(plan.names(prompt)):
            ids_N = next(written)
            content.update(name.encode() + ids_N.astype("<i4").tobytes())
            if not ids_N.size:
                report.counts[RESPONSES_LOST] = report.counts.get(RESPONSES_LOST, 0) + 1
                continue
            report.turns += 1
            report.unended += int(ids_N[-1]) not in plan.ends
            made = response_sample(prompt, name, number, ids_N)
            samples.append(TokenisedRow(name, row, number, made.input_ids, made.loss_mask))
        if samples:
            _add(block, prompt, row, samples)
    report.content = content.hexdigest()
    return block, UnitSummary(index, report, [block.summary])


def _add(block: Block, prompt: Sample, row: int, samples: list[TokenisedRow]) -> None:
    sums = HashedRow(
        0,
        row,
        len(samples),
        sum(int(sample.input_ids.size) for sample in samples),
        sum(int(sample.loss_mask.sum()) for sample in samples),
    )
    block.summary.rows += 1
    if prompt.split == "heldout":
        block.summary.candidates.append(sums)
        block.candidates += samples
    else:
        block.summary.train.add(sums.totals)
        block.train += samples


class ResponseUnits:
    """The units of all responses of one cache."""

    def __init__(self, task: WritingTask, store: Store) -> None:
        """Look at nothing yet.

        Args:
            task: what is written.
            store: the cache's root.
        """
        self._task = task
        self._store = store
        self.folder = PreparedFolder(Store(store.full_url(RESPONSE_UNITS)))

    def missing(self) -> tuple[list[ResponseShard], list[str]]:
        """Return the known shards without a file or a unit, and the summaries' files."""
        done, names = self.folder.done()
        files = set(self._store.list(RESPONSES))
        shards = [
            shard
            for shard in self._task.prompts.shards
            if shard.index not in done or shard.file_name not in files
        ]
        return shards, names

    def is_done(self, shard: ResponseShard) -> bool:
        """Return whether a shard has its file and its unit."""
        return shard.index in self.folder.done()[0] and self._store.exists(shard.file)

    def read(self, shard: ResponseShard, prompts: Sequence[Sample]) -> ReadResponses | None:
        """Return the responses of a shard; None where its file is missing or damaged."""
        try:
            data = self._store.read(shard.file)
        except FileNotFoundError:
            return None
        names = [name for prompt in prompts for name in self._task.plan.names(prompt)]
        digest = fingerprint(self._task.identity)
        return decode_responses(data, response_ids=names, identity_digest=digest)

    def commit(
        self,
        shard: ResponseShard,
        prompts: Sequence[Sample],
        responses_RN: Sequence[NDArray[np.int32]],
    ) -> UnitSummary:
        """Write the unit of a shard; its summary is the last."""
        block, summary = response_unit(shard.index, prompts, responses_RN, self._task.plan)
        block.summary.checksums = self.folder.write_block(
            shard.index, 0, (block.train, block.candidates)
        )
        self.folder.commit(summary)
        return summary

    def check_again(
        self,
        shard: ResponseShard,
        prompts: Sequence[Sample],
        responses_RN: Sequence[NDArray[np.int32]],
    ) -> None:
        """Compare responses that are written again with the unit of those that were lost.

        Before the capture has begun it does not matter: the unit is forgotten.

        Raises:
            CacheError: they are others.
        """
        if folder_identity(self._store) is None:
            self.folder.forget(shard.index)
            return
        for _, summaries in self.folder.read(self.folder.files_of(shard.index)):
            for summary in summaries:
                if summary.index != shard.index:
                    continue
                _, new = response_unit(shard.index, prompts, responses_RN, self._task.plan)
                if new.report.content != summary.report.content:
                    raise CacheError(
                        f"{self._store.full_url(shard.file)}: responses that were lost and written "
                        "again came out otherwise, and the shards there are made from the old ones",
                        expected=f"the files of {RESPONSES} as they were",
                        do="bring them back, or delete that cache",
                    )

    def remove_damaged(self) -> None:
        """Read every file of responses and remove the damaged ones: they are written again."""
        for shard in self._task.prompts.shards:
            if not self._store.exists(shard.file):
                continue
            if self.read(shard, self._task.prompts.prompts(shard)) is None:
                _log.warning("%s: damaged; written again", self._store.full_url(shard.file))
                self._store.delete(shard.file)

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
        found: dict[str, tuple[QuarantinedRow, ...]] = {}
        for _, summaries in self.folder.read(self.folder.done()[1]):
            for summary in summaries:
                if summary.report.counts.get(RESPONSES_LOST):
                    shard = self._task.prompts.shards[summary.index]
                    file = self.read(shard, self._task.prompts.prompts(shard))
                    found[shard.name] = () if file is None else file.quarantined
        return dict(sorted(found.items()))

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
        last = next(rows[-1] for rows in reversed([*lacking.values()]) if rows)
        shown = ", ".join(files[name] for name in list(lacking)[:_SHOWN])
        more = " ..." if len(lacking) > _SHOWN else ""
        raise ModelError(
            f"{self._store.url}: {count} of {total} responses could not be written, the last of "
            f"them {last.sample_id}: {last.error}",
            expected=f"at most {allowed} (capture.max_quarantined_fraction)",
            do=f"mend the teacher, delete {shown}{more} and run the same command again, or allow "
            "more; the other responses are kept",
        )

    def _make_again(self, unit: Unit) -> None:
        """Make a damaged unit from the file of its responses.

        Raises:
            CacheError: that is damaged as well.
        """
        shard = self._task.prompts.shards[unit.index]
        prompts = self._task.prompts.prompts(shard)
        found = self.read(shard, prompts)
        if found is None:
            raise CacheError(
                f"{self._store.full_url(shard.file)}: damaged or missing, and so is what was made "
                "from it",
                do="bring the file back, or delete that cache",
            )
        self.commit(shard, prompts, found.tokens)


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
