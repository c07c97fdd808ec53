"""The training stream of one rank: steps by number, prepared ahead, resumed by their number."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.reader import ShardDamaged
from pipeline.data.collate import Batch, collate
from pipeline.data.order.plan import Pack, StepPlan, TrainPlan
from pipeline.data.settings import DataSettings
from pipeline.data.source import RowSource
from pipeline.data.stream.prefetch import Patience, Prefetcher
from pipeline.data.stream.read_ahead import ReadAhead
from pipeline.data.stream.skipped_shards import LeftOut
from pipeline.data.temperature import OffGrid
from pipeline.errors import CacheError, ConfigError

__all__ = ["Agree", "StepBatch", "TrainStream"]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one rank does in one optimizer step."""

    step: int
    epoch: int
    micro_batches: list[Batch]
    """As many as `accumulation`, on every rank; a short step has empty ones (N = 0)."""
    num_loss_tokens: int
    """Of ALL ranks and micro-batches; what the summed loss is divided by."""
    num_tokens: int
    """Of all ranks and micro-batches."""
    num_rows_left_out: int = 0
    """Of all ranks: rows of damaged shards that the step does without."""
    damaged: tuple[LeftOut, ...] = ()
    """Shards that this rank found damaged; the step then has no batches and has to be made anew."""


Agree = Callable[[Sequence[LeftOut]], Sequence[LeftOut]]
"""Takes the shards that this rank found damaged in a step and returns those of all ranks."""


class TrainStream:
    """Training steps of one rank; its whole state is the number of the next step.

    And, where shards are damaged and the user wants to go on, which of them are left out.
    """

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
            packs_per_step: packs of one optimizer step over all ranks and micro-batches; of no
                effect with `settings.batch_tokens`.
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
        if settings.batch_tokens is None and packs_per_step % (world * accumulation):
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
        self._waited_before = 0.0
        self.left_out: list[LeftOut] = []
        """Shards that the run does without, in the order in which they were found."""
        self.plan = TrainPlan(
            source,
            seed=seed,
            packs_per_step=packs_per_step,
            pack_length=settings.pack_length or pack_length,
            shuffle_shards=settings.shuffle_shards,
            packing=settings.packing,
            batch_tokens=settings.batch_tokens,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of every epoch, the last and smaller one included."""
        return self.plan.steps_per_epoch

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for data so far."""
        return self._waited_before + (self._prefetcher.wait_seconds if self._prefetcher else 0.0)

    def steps(
        self, start_step: int = 0, stop_step: int | None = None, *, agree: Agree | None = None
    ) -> Generator[StepBatch, None, None]:
        """Yield the steps from `start_step` on, the same on all ranks whatever is damaged.

        Where shards may be left out, the ranks compare what they found before each step. A step
        in which one of them found damage is made anew by all without the shard, and so are the
        ones after it. Close the generator to stop its thread.

        Raises:
            CacheError: a shard is damaged and may not be left out, or none is left.
            StoreError: the data did not come in time.
        """
        step = start_step
        while stop_step is None or step < stop_step:
            found: Sequence[LeftOut] = ()
            with self.iterate(step, stop_step) as batches:
                for batch in batches:
                    found = agree(batch.damaged) if agree else batch.damaged
                    if found:
                        break
                    yield batch
                    step = batch.step + 1
            self.leave_out(found)

    def leave_out(self, shards: Sequence[LeftOut]) -> None:
        """Do without these shards, each from its step on; known ones are passed over.

        Raises:
            CacheError: no shard is left.
        """
        for record in sorted(shards):
            if any(known.shard == record.shard for known in self.left_out):
                continue
            self.left_out.append(record)
            self.plan.leave_out(record.shard, record.from_step)
        sizes = self._source.shard_rows()
        if {shard for shard, rows in enumerate(sizes) if rows} <= {r.shard for r in self.left_out}:
            raise CacheError(
                f"every training shard is damaged, the last one {self.left_out[-1].path}",
                expected="some that are whole",
                do="run the cache-teacher command that made this cache again",
            )

    def iterate(self, start_step: int = 0, stop_step: int | None = None) -> Prefetcher[StepBatch]:
        """Return the steps from `start_step` on, without end unless `stop_step` is given.

        Reads nothing of earlier steps. Close the iterator (or use `with`) to stop its thread;
        calling `iterate` again closes the one before.
        """
        self.close()
        self._waited_before = self.wait_seconds
        self._prefetcher = Prefetcher(
            self._planned(start_step, stop_step),
            ahead=self._settings.prefetch_batches,
            patience=Patience(
                self._settings.stall_warning_s, self._settings.stall_timeout_s, self._doing
            ),
        )
        return self._prefetcher

    def close(self) -> None:
        """Stop the thread of the last `iterate`, if it runs."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def _doing(self) -> str:
        reading = self._source.reading()
        return "reading " + ", ".join(reading) if reading else "decoding rows"

    def _planned(self, step: int, stop_step: int | None) -> Iterator[StepBatch]:
        ahead = ReadAhead(self._source.open, threads=self._settings.read_threads)
        try:
            while stop_step is None or step < stop_step:
                ahead.want(self.plan.shards_ahead(step))
                yield self._load(self.plan.step(step))
                step += 1
        finally:
            ahead.close()

    def _load(self, plan: StepPlan) -> StepBatch:
        micro_packs = plan.micro_batches(**self._place)
        rows, damaged = self._read([pack for packs in micro_packs for pack in packs], plan.step)
        return StepBatch(
            step=plan.step,
            epoch=plan.epoch,
            micro_batches=[]
            if damaged
            else [
                collate(
                    [rows[pack.shard, row] for pack in packs for row in pack.rows],
                    temperature=self._temperature,
                    off_grid=self._off_grid,
                )
                for packs in micro_packs
            ],
            num_loss_tokens=plan.num_loss_tokens,
            num_tokens=plan.num_tokens,
            num_rows_left_out=plan.num_rows_left_out,
            damaged=tuple(damaged),
        )

    def _read(
        self, packs: Sequence[Pack], step: int
    ) -> tuple[dict[tuple[int, int], CachedSequence], list[LeftOut]]:
        """Read the rows of packs with one call per shard; return what is damaged apart."""
        wanted: dict[int, list[int]] = {}
        for pack in packs:
            wanted.setdefault(pack.shard, []).extend(pack.rows)
        found: dict[tuple[int, int], CachedSequence] = {}
        damaged: list[LeftOut] = []
        for shard, rows in wanted.items():
            try:
                sequences = self._source.read_rows(shard, rows)
            except ShardDamaged as error:
                if self._settings.on_damaged_shard == "stop":
                    raise
                name, count = self._source.shard_name(shard), self._source.shard_rows()[shard]
                damaged.append(LeftOut(shard, step, name, count, error.reason))
                continue
            found.update(zip([(shard, row) for row in rows], sequences, strict=True))
        return found, damaged
