"""Where the capture takes its shards from: a prepared corpus that may still grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Protocol

from pipeline.cache.layout.names import SPLITS
from pipeline.corpus.conclusion import conclude_samples
from pipeline.corpus.intake import Intake
from pipeline.corpus.prepared.summary import CorpusSummary, SampleTotals, UnitReport
from pipeline.corpus.prepared.view import CorpusView
from pipeline.corpus.sample import CorpusCounts, Sample
from pipeline.teacher.capture.groups import Grouping, GroupReader, GroupShard
from pipeline.teacher.capture.plan import PlannedShard

__all__ = ["PreparedShards", "ShardSource", "shard_counts"]


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


class PreparedShards:
    """The shards of a prepared corpus; satisfies `ShardSource`."""

    def __init__(
        self,
        open_view: Callable[[], CorpusView],
        shard_tokens: int,
        *,
        conclude: Callable[[CorpusSummary], CorpusCounts],
        refuses: Callable[[UnitReport], bool] = lambda _: False,
    ) -> None:
        """Know nothing yet.

        Args:
            open_view: opens the view, when it is first asked for.
            shard_tokens: of a shard, about.
            conclude: reports on the complete corpus and returns its counts, or raises.
            refuses: whether the units so far have too many bad rows to capture any.
        """
        self._open_view = open_view
        self._conclude = conclude
        self._refuses = refuses
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

    @classmethod
    def of_rows(
        cls, open_view: Callable[[], CorpusView], intake: Intake, shard_tokens: int
    ) -> PreparedShards:
        """Return the shards of a corpus that is read for its samples."""
        return cls(
            open_view,
            shard_tokens,
            conclude=partial(conclude_samples, intake=intake),
            refuses=lambda report: report.bad.too_many(report.rows, intake.settings),
        )

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
            self._counts = self._conclude(self._view.summary())
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
        if not self.is_complete and self._refuses(self._view.report):
            return ()
        return self._shards

    def projected(self) -> SampleTotals:
        """Return the sums, projected by the bytes of the source."""
        return self._view.projected()

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
