"""The training stream of one rank: steps by number, prepared ahead, resumed by their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.cache.sparse import CachedSequence
from pipeline.data.collate import Batch, collate
from pipeline.data.plan import Pack, StepPlan, TrainPlan
from pipeline.data.prefetch import Prefetcher
from pipeline.data.settings import DataSettings
from pipeline.data.source import RowSource
from pipeline.data.temperature import OffGrid
from pipeline.errors import ConfigError

__all__ = ["StepBatch", "TrainStream"]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one rank does in one optimizer step."""

    step: int
    epoch: int
    micro_batches: list[Batch]
    """As many as `accumulation`, on every rank; a short step has empty ones (N = 0)."""
    num_counted_tokens: int
    """Of ALL ranks and micro-batches; what the summed loss is divided by."""
    num_tokens: int
    """Of all ranks and micro-batches."""


class TrainStream:
    """Training steps of one rank; its whole state is the number of the next step."""

    def __init__(
        self,
        source: RowSource,
        settings: DataSettings,
        *,
        seed: int,
        packs_per_step: int,
        rank: int,
        world: int,
        accumulation: int,
        pack_length: int,
        temperature: float,
        off_grid: OffGrid = "refuse",
    ) -> None:
        """Plan the run from row lengths; reads no row.

        Args:
            source: the training rows.
            settings: packing, shuffling and prefetching.
            seed: of the order.
            packs_per_step: packs of one optimizer step over all ranks and micro-batches.
            rank: this rank, from 0.
            world: ranks that read different data.
            accumulation: micro-batches of a step on one rank.
            pack_length: the cache's max_length; `settings.pack_length` goes before it.
            temperature: of the loss.
            off_grid: as in `collate`.

        Raises:
            CacheError: no rows.
            ConfigError: the step does not divide, or a row is longer than a pack.
        """
        if packs_per_step % (world * accumulation):
            raise ConfigError(
                f"a step of {packs_per_step} packs on {world} ranks with {accumulation}"
                " micro-batches each",
                expected=f"a multiple of {world * accumulation}",
                do="change the batch size or the accumulation steps",
            )
        self._source = source
        self._settings = settings
        self._place = {"rank": rank, "world": world, "accumulation": accumulation}
        self._temperature = temperature
        self._off_grid: OffGrid = off_grid
        self._prefetcher: Prefetcher[StepBatch] | None = None
        self.plan = TrainPlan(
            source,
            seed=seed,
            packs_per_step=packs_per_step,
            pack_length=settings.pack_length or pack_length,
            shuffle_shards=settings.shuffle_shards,
            packing=settings.packing,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of every epoch, the last and smaller one included."""
        return self.plan.steps_per_epoch

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for data since the last `iterate`."""
        return self._prefetcher.wait_seconds if self._prefetcher else 0.0

    def iterate(self, start_step: int = 0, stop_step: int | None = None) -> Prefetcher[StepBatch]:
        """Return the steps from `start_step` on, without end unless `stop_step` is given.

        Reads nothing of earlier steps. Close the iterator (or use `with`) to stop its thread;
        calling `iterate` again closes the one before.
        """
        self.close()
        steps = self._steps(start_step, stop_step)
        self._prefetcher = Prefetcher(steps, ahead=self._settings.prefetch_batches)
        return self._prefetcher

    def close(self) -> None:
        """Stop the thread of the last `iterate`, if it runs."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def _steps(self, step: int, stop_step: int | None) -> Iterator[StepBatch]:
        while stop_step is None or step < stop_step:
            yield self._load(self.plan.step(step))
            step += 1

    def _load(self, plan: StepPlan) -> StepBatch:
        micro_packs = plan.micro_batches(**self._place)
        rows = _read(self._source, [pack for packs in micro_packs for pack in packs])
        return StepBatch(
            step=plan.step,
            epoch=plan.epoch,
            micro_batches=[
                collate(
                    [rows[pack.shard, row] for pack in packs for row in pack.rows],
                    temperature=self._temperature,
                    max_entries=self._settings.max_entries,
                    off_grid=self._off_grid,
                )
                for packs in micro_packs
            ],
            num_counted_tokens=plan.num_counted_tokens,
            num_tokens=plan.num_tokens,
        )


def _read(source: RowSource, packs: Sequence[Pack]) -> dict[tuple[int, int], CachedSequence]:
    """Read the rows of packs with one call per shard."""
    wanted: dict[int, list[int]] = {}
    for pack in packs:
        wanted.setdefault(pack.shard, []).extend(pack.rows)
    return {
        (shard, row): sequence
        for shard, rows in wanted.items()
        for row, sequence in zip(rows, source.read_rows(shard, rows), strict=True)
    }
