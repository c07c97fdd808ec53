"""Shards of a prepared corpus: cut as far as it is known, the same whoever cuts and when.

Consecutive blocks of the corpus form a *group* once they hold the tokens of a shard, and a group is
cut into equal shards. So a shard needs only the blocks of its group, and what is planned does not
change when more of the corpus is prepared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import xxhash

from pipeline.corpus.prepared.summary import SampleTotals
from pipeline.corpus.prepared.view import CorpusView, PlacedBlock
from pipeline.corpus.sample import Sample, SplitName
from pipeline.storage.parallel import in_threads

__all__ = ["Group", "GroupReader", "GroupShard", "Grouping", "cut_lengths"]

_GROUPS_HELD = 2
"""In memory: the one that a worker captures from, and the one that is being written."""
_READS_AT_ONCE = 8


@dataclass(frozen=True)
class Group:
    """Consecutive blocks, of one split."""

    split: SplitName
    first_shard: int
    num_shards: int
    blocks: tuple[PlacedBlock, ...]
    totals: SampleTotals

    @property
    def source_xxh3_128(self) -> str:
        """Checksum of the checksums of all its files: what its shards were made from."""
        names = "".join(checksum for block in self.blocks for checksum in block.checksums)
        return xxhash.xxh3_128_hexdigest(names.encode())


@dataclass(slots=True)
class Grouping:
    """The groups of one split so far."""

    split: SplitName
    shard_tokens: int
    groups: list[Group] = field(default_factory=list)
    num_shards: int = 0
    _blocks: list[PlacedBlock] = field(default_factory=list)
    _totals: SampleTotals = field(default_factory=SampleTotals)

    def add(self, block: PlacedBlock) -> None:
        """Add the next block of the corpus."""
        totals = block.split.num_train if self.split == "train" else block.split.num_heldout
        if not totals.samples:
            return
        self._blocks.append(block)
        self._totals.add(totals)
        if self._totals.tokens >= self.shard_tokens:
            self.close()

    def close(self) -> None:
        """Make a group of what there is; at the end of the corpus."""
        if not self._blocks:
            return
        count = min(self._totals.samples, max(1, round(self._totals.tokens / self.shard_tokens)))
        self.groups.append(
            Group(self.split, self.num_shards, count, tuple(self._blocks), self._totals)
        )
        self.num_shards += count
        self._blocks, self._totals = [], SampleTotals()


class GroupReader:
    """Reads the samples of groups; keeps the last few. Safe to use from several threads."""

    def __init__(self, view: CorpusView) -> None:
        """Read nothing yet."""
        self._view = view
        self._held: OrderedDict[tuple[str, int], list[Sample]] = OrderedDict()
        self._lock = Lock()

    def samples(self, group: Group) -> list[Sample]:
        """Return all samples of a group, in the order of the source.

        Raises:
            CorpusError: the prepared corpus is damaged, and the source gives other text now.
        """
        key = (group.split, group.first_shard)
        with self._lock:
            if key not in self._held:
                parts = in_threads(
                    lambda block: self._view.samples(block, group.split),
                    group.blocks,
                    _READS_AT_ONCE,
                )
                self._held[key] = [sample for part in parts for sample in part]
            self._held.move_to_end(key)
            while len(self._held) > _GROUPS_HELD:
                self._held.popitem(last=False)
            return self._held[key]


@dataclass(frozen=True)
class GroupShard:
    """The samples of one shard of a group."""

    reader: GroupReader
    group: Group
    number: int
    """Among the shards of the group."""

    @property
    def num_tokens(self) -> int:
        """Tokens, about: equal shares of the group."""
        shards, tokens = self.group.num_shards, self.group.totals.tokens
        return tokens * (self.number + 1) // shards - tokens * self.number // shards

    @property
    def source_xxh3_128(self) -> str:
        """Checksum of what it is made from."""
        return self.group.source_xxh3_128

    def samples(self) -> Sequence[Sample]:
        """Read them.

        Raises:
            CorpusError: the prepared corpus is damaged, and the source gives other text now.
        """
        samples = self.reader.samples(self.group)
        starts = cut_lengths([sample.input_ids.size for sample in samples], self.group.num_shards)
        return samples[starts[self.number] : starts[self.number + 1]]


def cut_lengths(lengths: Sequence[int], shards: int) -> list[int]:
    """Return where each of `shards` parts of equal tokens begins, and the number of samples.

    A sample belongs to the part in which its middle falls, so that parts differ by at most one
    sample from equal size; but no part is empty.
    """
    lengths_N = np.asarray(lengths, np.int64)
    ends_N = np.cumsum(lengths_N)
    total = int(ends_N[-1]) if len(ends_N) else 0
    middle_N = ends_N - lengths_N / 2
    shard_N = np.minimum(shards - 1, (middle_N * shards / max(total, 1)).astype(np.int64))
    starts = np.searchsorted(shard_N, np.arange(shards))
    order = np.arange(shards)
    starts = np.maximum.accumulate(starts - order) + order  # each at least one after the one before
    starts = np.minimum(starts, len(lengths_N) - shards + order)
    return [*starts.tolist(), len(lengths_N)]
