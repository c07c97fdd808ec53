"""Where the capture takes its shards from: a prepared corpus that may still grow, or a table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from pipeline.cache.layout.names import SPLITS
from pipeline.corpus.conclusion import conclude_samples
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.intake import Intake
from pipeline.corpus.prepared.summary import SampleTotals
from pipeline.corpus.prepared.view import CorpusView
from pipeline.corpus.sample import CorpusCounts, Sample
from pipeline.corpus.table import SampleTable
from pipeline.teacher.capture.groups import Grouping, GroupReader, GroupShard, cut_lengths
from pipeline.teacher.capture.plan import PlannedShard

__all__ = [
    "PreparedShards",
    "ShardSource",
    "TableSamples",
    "TableShards",
    "cut_table",
    "shard_counts",
]


class ShardSource(Protocol):
    """The shards of a cache as far as they are known, and what they are made of."""

    def refresh(self) -> None:
        """Look for more.

        Raises:
            CorpusError: the corpus is complete, and cannot be used.
        """
        ...

    @property
    def is_complete(self) -> bool:
        """Whether every shard is known."""
        ...

    @property
    def shards(self) -> Sequence[PlannedShard]:
        """The shards that are known."""
        ...

    def projected(self) -> SampleTotals:
        """Return the sums over all samples; projected by bytes while some are not known."""
        ...

    def counts(self) -> CorpusCounts:
        """Return the counts of the complete corpus."""
        ...

    @property
    def content(self) -> str:
        """Digest of everything that was read of the complete corpus."""
        ...

    def first_samples(self) -> Iterator[Sample]:
        """Read samples from the beginning on, of those that are known."""
        ...


def shard_counts(source: ShardSource) -> dict[str, int]:
    """Return the shards of each split that has any."""
    splits = [shard.split for shard in source.shards]
    return {split: splits.count(split) for split in SPLITS if split in splits}


class TableShards:
    """The shards of samples that this process holds; satisfies `ShardSource`."""

    def __init__(self, corpus: Corpus, shard_tokens: int) -> None:
        """Cut all of it."""
        self._corpus = corpus
        self._shards = cut_table(corpus.samples, shard_tokens=shard_tokens)

    def refresh(self) -> None:
        """Nothing more comes."""

    @property
    def is_complete(self) -> bool:
        """It always is."""
        return True

    @property
    def shards(self) -> Sequence[PlannedShard]:
        """All."""
        return self._shards

    def projected(self) -> SampleTotals:
        """Return the sums over all samples."""
        counts = self._corpus.counts
        return SampleTotals(counts.samples, counts.tokens, counts.loss_tokens)

    def counts(self) -> CorpusCounts:
        """Return the counts of the corpus."""
        return self._corpus.counts

    @property
    def content(self) -> str:
        """Digest of the samples."""
        return self._corpus.content

    def first_samples(self) -> Iterator[Sample]:
        """Read samples from the beginning on."""
        return iter(self._corpus.samples)


class PreparedShards:
    """The shards of a prepared corpus; satisfies `ShardSource`."""

    def __init__(
        self, open_view: Callable[[], CorpusView], intake: Intake, shard_tokens: int
    ) -> None:
        """Know nothing yet; the view is opened when it is first asked for."""
        self._open_view = open_view
        self._intake = intake
        self._groupings = [Grouping("train", shard_tokens), Grouping("heldout", shard_tokens)]
        self._groups = [0, 0]
        self._blocks = 0
        self._shards: list[PlannedShard] = []
        self._counts: CorpusCounts | None = None

    @cached_property
    def _view(self) -> CorpusView:
        return self._open_view()

    @cached_property
    def _reader(self) -> GroupReader:
        return GroupReader(self._view)

    def refresh(self) -> None:
        """Look for units that are done, and cut what is new; whoever looks cuts the same."""
        if self._counts is not None:
            return
        self._view.refresh()
        for block in self._view.blocks[self._blocks :]:
            for grouping in self._groupings:
                grouping.add(block)
        self._blocks = len(self._view.blocks)
        if self._view.is_complete:
            self._counts = conclude_samples(self._view.summary(), self._intake)
            for grouping in self._groupings:
                grouping.close()
        for number, grouping in enumerate(self._groupings):
            for group in grouping.groups[self._groups[number] :]:
                self._shards += [
                    PlannedShard(
                        group.split,
                        group.first_shard + number_in_group,
                        GroupShard(self._reader, group, number_in_group),
                    )
                    for number_in_group in range(group.num_shards)
                ]
            self._groups[number] = len(grouping.groups)

    @property
    def is_complete(self) -> bool:
        """Whether all units are done."""
        return self._counts is not None

    @property
    def shards(self) -> Sequence[PlannedShard]:
        """Those of the units so far; of a corpus with too many bad rows so far, none."""
        report = self._view.report
        if not self.is_complete and report.bad.too_many(report.rows, self._intake.settings):
            return ()
        return self._shards

    def projected(self) -> SampleTotals:
        """Return the sums, projected by the bytes of the source."""
        view, share = self._view, self._view.known_share or 1.0
        known = SampleTotals()
        known.add(view.train)
        known.add(view.heldout)
        return SampleTotals(
            *(round(n / share) for n in (known.samples, known.tokens, known.loss_tokens))
        )

    def counts(self) -> CorpusCounts:
        """Return the counts of the complete corpus."""
        assert self._counts is not None
        return self._counts

    @property
    def content(self) -> str:
        """Digest of everything that was read."""
        return self._view.report.content

    def first_samples(self) -> Iterator[Sample]:
        """Read the training samples of the blocks so far."""
        for block in self._view.blocks:
            yield from self._view.samples(block, "train")


@dataclass(frozen=True, slots=True)
class TableSamples:
    """Samples of a table, as those of a shard."""

    table: SampleTable

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return self.table.num_tokens

    @property
    def source_xxh3_128(self) -> str:
        """Nothing: the samples are of this process alone."""
        return ""

    def samples(self) -> Sequence[Sample]:
        """Return the table."""
        return self.table


def cut_table(samples: SampleTable, *, shard_tokens: int) -> tuple[PlannedShard, ...]:
    """Cut each split into shards of about `shard_tokens`, in the corpus's order."""
    shards: list[PlannedShard] = []
    for split in ("train", "heldout"):
        chosen = samples.of_split(split)
        if not len(chosen):
            continue
        lengths = list(itertools.chain.from_iterable(chosen.lengths()))
        count = min(len(chosen), max(1, round(chosen.num_tokens / shard_tokens)))
        cuts = itertools.pairwise(cut_lengths(lengths, count))
        shards += [
            PlannedShard(split, index, TableSamples(chosen[start:stop]))
            for index, (start, stop) in enumerate(cuts)
        ]
    return tuple(shards)
