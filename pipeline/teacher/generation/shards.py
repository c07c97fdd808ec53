"""Shards of prompts, cut from a prepared corpus as far as it is known, the same whoever cuts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from pipeline.cache.layout.names import response_name
from pipeline.corpus.prepared.summary import CorpusSummary, SampleTotals
from pipeline.corpus.prepared.view import CorpusView, PlacedBlock
from pipeline.corpus.prompts import PromptIntake, conclude_prompts
from pipeline.corpus.sample import CorpusCounts, Sample

__all__ = ["PromptShards", "ResponseShard"]

_BLOCKS_HELD = 2
"""In memory while responses are written. A block is read as a whole, for a shard of a few of its
prompts: the next shards are of the same block, and one can lie across the end of a block."""


@dataclass(frozen=True, slots=True)
class ResponseShard:
    """Prompts that are answered in one call, all their responses together."""

    index: int
    ranges: tuple[tuple[PlacedBlock, int, int], ...]
    """Blocks of the corpus; of each, the prompts from the first number to before the second."""

    @property
    def num_prompts(self) -> int:
        """How many prompts."""
        return sum(stop - start for _, start, stop in self.ranges)

    @property
    def name(self) -> str:
        """The shard's name in leases and logs; no shard of a split is called so."""
        return f"responses-{self.index:05d}"

    @property
    def file(self) -> str:
        """The path of its file inside the cache."""
        return response_name(self.index)


class PromptShards:
    """The prompts of a corpus, cut into shards; grows with `refresh` until it is complete."""

    def __init__(
        self,
        open_view: Callable[[], CorpusView],
        intake: PromptIntake,
        shard_prompts: int,
        *,
        only_heldout: bool = False,
    ) -> None:
        """Know nothing yet; the view is opened when it is first asked for.

        Args:
            open_view: opens the prepared corpus.
            intake: how it is read.
            shard_prompts: prompts of a shard.
            only_heldout: the held-out prompts alone.
        """
        self._only_heldout = only_heldout
        self._open_view = open_view
        self._intake = intake
        self._size = shard_prompts
        self._blocks = 0
        self._open: list[tuple[PlacedBlock, int, int]] = []
        """Of the shard that is not full yet."""
        self._shards: list[ResponseShard] = []
        self._counts: CorpusCounts | None = None
        self._held: OrderedDict[tuple[int, int], list[Sample]] = OrderedDict()

    @cached_property
    def _view(self) -> CorpusView:
        return self._open_view()

    @cached_property
    def _conclude(self) -> Callable[[CorpusSummary], CorpusCounts]:
        return partial(conclude_prompts, intake=self._intake, only_heldout=self._only_heldout)

    def refresh(self) -> None:
        """Look for units that are done, and cut what is new.

        Raises:
            CorpusError: the corpus is complete, and cannot be used.
        """
        if self._counts is not None:
            return
        self._view.refresh()
        for block in self._view.blocks[self._blocks :]:
            self._cut(block)
        self._blocks = len(self._view.blocks)
        if self._view.is_complete:
            self._counts = self._conclude(self._view.summary())
            if self._open:
                self._close()

    @property
    def is_complete(self) -> bool:
        """Whether every shard is known."""
        return self._counts is not None

    @property
    def shards(self) -> Sequence[ResponseShard]:
        """Those of the units so far; of a corpus with too many bad rows so far, none."""
        report = self._view.report
        if not self.is_complete and report.bad.too_many(report.rows, self._intake.settings):
            return ()
        return self._shards

    def counts(self) -> CorpusCounts:
        """Return the counts of all prompts: each is a sample, no token is supervised."""
        assert self._counts is not None
        return self._counts

    def projected(self) -> SampleTotals:
        """Return the sums over all prompts; projected by bytes while some are not known."""
        return self._view.projected(only_heldout=self._only_heldout)

    def prompts(self, shard: ResponseShard) -> list[Sample]:
        """Read the prompts of a shard, in the order of the source.

        Raises:
            CorpusError: the prepared corpus is damaged, and the source gives other text now.
        """
        return [
            prompt
            for block, start, stop in shard.ranges
            for prompt in self._block(block)[start:stop]
        ]

    def release(self) -> None:
        """Give back the memory of the prompts that were read."""
        self._held.clear()

    def first_prompts(self) -> Iterator[Sample]:
        """Read prompts from the beginning on, of those that are known."""
        for block in self._view.blocks:
            yield from self._block(block)

    def _block(self, block: PlacedBlock) -> list[Sample]:
        key = block.unit, block.number
        if key not in self._held:
            found = list(self._view.samples(block, "heldout"))
            if not self._only_heldout:
                found += self._view.samples(block, "train")
            self._held[key] = sorted(found, key=lambda sample: sample.source_index)
        self._held.move_to_end(key)
        while len(self._held) > _BLOCKS_HELD:
            self._held.popitem(last=False)
        return self._held[key]

    def _cut(self, block: PlacedBlock) -> None:
        start, left = 0, block.split.num_heldout.samples
        left += 0 if self._only_heldout else block.split.num_train.samples
        while left:
            taken = min(left, self._size - sum(stop - begin for _, begin, stop in self._open))
            self._open.append((block, start, start + taken))
            start, left = start + taken, left - taken
            if sum(stop - begin for _, begin, stop in self._open) == self._size:
                self._close()

    def _close(self) -> None:
        self._shards.append(ResponseShard(len(self._shards), tuple(self._open)))
        self._open = []
