"""The training stream of one rank: steps by number, prepared ahead, resumed by their number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.reader import ShardDamaged
from pipeline.data.collate import Batch, Score, collate
from pipeline.data.mixture.rows import mixture_of
from pipeline.data.order.choose import make_plan
from pipeline.data.order.mixed_plan import MixedPlan
from pipeline.data.order.step import Pack, StepPlan, lanes_of_rank
from pipeline.data.order.totals import SplitTotals
from pipeline.data.settings import DataSettings
from pipeline.data.source import RowSource
from pipeline.data.stream.prefetch import Patience, Prefetcher
from pipeline.data.stream.read_ahead import ReadAhead
from pipeline.data.stream.skipped_shards import SkippedShard
from pipeline.data.temperature import UncachedTemperature
from pipeline.errors import CacheError, ConfigError
from pipeline.program import command_name

__all__ = ["Agree", "StepBatch", "TrainStream"]

_log = logging.getLogger(__name__)

_STEPS_AHEAD = 32
"""How many steps before its first row a shard is opened, at most: lanes come to the ends of their
shards at different steps, so few are open for nothing, and a slow store has half a minute."""


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
    num_skipped_rows: int = 0
    """Of all ranks: rows of damaged shards that the step skips."""
    damaged: tuple[SkippedShard, ...] = ()
    """Shards that this rank found damaged; the step then has no batches and is made again."""


Agree = Callable[[Sequence[SkippedShard]], Sequence[SkippedShard]]
"""Takes the shards that this rank found damaged in a step and returns those of all ranks."""


class TrainStream:
    """Training steps of one rank; its state is the number of the next step.

    And, where shards are damaged and the user wants to go on, which of them are skipped.
    """

    def __init__(
        self,
        source: RowSource,
        settings: DataSettings,
        *,
        seed: int,
        packs_per_step: int,
        rank: int,
        world_size: int,
        accumulation: int,
        pack_length: int,
        temperature: float,
        uncached_temperature: UncachedTemperature = "reject",
        totals: SplitTotals | None = None,
        score: Score | None = None,
    ) -> None:
        """Plan the run from the lengths of rows; reads no row.

        Args:
            source: the training rows.
            settings: packing, shuffling and prefetching.
            seed: of the order.
            packs_per_step: packs of one optimizer step over all ranks and micro-batches; of no
                effect with `settings.batch_tokens`.
            rank: this rank, from 0.
            world_size: ranks that read different data.
            accumulation: micro-batches of a step on one rank.
            pack_length: the cache's max_length; `settings.pack_length` goes before it.
            temperature: of the loss.
            uncached_temperature: as in `collate`.
            totals: of the source, where they are known.
            score: as in `collate`.

        Raises:
            CacheError: no rows.
            ConfigError: the step does not divide, or a row is longer than a pack.
        """
        if settings.batch_tokens is None and packs_per_step % (world_size * accumulation):
            raise ConfigError(
                f"a step of {packs_per_step} packs on {world_size} ranks with {accumulation}"
                " micro-batches each",
                expected=f"a multiple of {world_size * accumulation}",
                do="change the batch size or the accumulation steps",
            )
        self._source = source
        self._settings = settings
        self._place = {"rank": rank, "world_size": world_size, "accumulation": accumulation}
        self._temperature = temperature
        self._uncached_temperature: UncachedTemperature = uncached_temperature
        self._score = score
        self._prefetcher: Prefetcher[StepBatch] | None = None
        self._waited_before = 0.0
        self.skipped_shards: list[SkippedShard] = []
        """Shards that the run skips, in the order in which they were found."""
        self.plan = make_plan(
            source,
            settings,
            seed=seed,
            packs_per_step=packs_per_step,
            pack_length=pack_length,
            totals=totals,
        )
        self._lanes = lanes_of_rank(
            self.plan.lanes,
            rank=rank,
            world_size=world_size,
            by_tokens=settings.batch_tokens is not None,
        )
        if rank == 0 and world_size > self.plan.lanes:
            _log.warning(
                "%d processes share %d lanes of the data: each shard is read by up to %d; %s",
                world_size,
                self.plan.lanes,
                -(-world_size // self.plan.lanes) + bool(world_size % self.plan.lanes),
                "a larger data.batch_tokens has room for more lanes, up to data.lanes"
                if settings.batch_tokens is not None
                else f"raise data.lanes to {world_size} or more, in a new run",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of every epoch, the last and smaller one included."""
        return self.plan.steps_per_epoch

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for data so far."""
        return self._waited_before + (self._prefetcher.wait_seconds if self._prefetcher else 0.0)

    def is_ready(self) -> bool:
        """Whether the next step, or the end, can be had without waiting."""
        return self._prefetcher is not None and self._prefetcher.is_ready()

    def cache_epochs(self, steps: int) -> dict[str, float]:
        """Return how often the first `steps` steps go through each cache of a mixture, by tag."""
        mixture = mixture_of(self._source)
        if mixture is None or not isinstance(self.plan, MixedPlan):
            return {}
        epochs = self.plan.epochs(steps)
        return {part.tag: e for part, e in zip(mixture.parts, epochs, strict=True)}

    def tokens_of(self, steps: int) -> int:
        """Return the tokens of the first `steps` steps, repeats counted."""
        return self.plan.tokens_before(steps)

    def skipped_rows_of(self, steps: int) -> int:
        """Return the rows of damaged shards that these steps skip, repeats counted."""
        return self.plan.skipped_before(steps)[0]

    def steps(
        self, start_step: int = 0, stop_step: int | None = None, *, agree: Agree | None = None
    ) -> Generator[StepBatch, None, None]:
        """Yield the steps from `start_step` on, the same on all ranks whatever is damaged.

        Where shards may be skipped, the ranks compare what they found before each step. A step in
        which one of them found damage is made again by all without the shard, and so are the
        ones after it. Close the generator to stop its thread.

        Raises:
            CacheError: a shard is damaged and may not be skipped, or none is left.
            StoreError: the data did not come in time.
        """
        step = start_step
        while stop_step is None or step < stop_step:
            found: Sequence[SkippedShard] = ()
            with self.iterate(step, stop_step) as batches:
                for batch in batches:
                    found = agree(batch.damaged) if agree else batch.damaged
                    if found:
                        break
                    yield batch
                    step = batch.step + 1
            self.skip_shards(found)

    def skip_shards(self, shards: Sequence[SkippedShard]) -> None:
        """Skip these shards, each from its step on; known ones are passed over.

        Raises:
            CacheError: no shard is left.
        """
        for record in sorted(shards):
            if any(known.shard == record.shard for known in self.skipped_shards):
                continue
            self.skipped_shards.append(record)
            self.plan.skip_shard(record.shard, record.from_step)
        sizes = self._source.shard_rows()
        if {shard for shard, rows in enumerate(sizes) if rows} <= {
            r.shard for r in self.skipped_shards
        }:
            raise CacheError(
                f"every training shard is damaged, the last one {self.skipped_shards[-1].path}",
                expected="some that are not",
                do=f"run {command_name('pipeline.cache')} repair on this cache; it writes again "
                "only what is damaged",
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
                plan = self.plan.step(step)
                mine = plan.micro_batches(**self._place)
                ahead_steps = _STEPS_AHEAD
                if stop_step is not None:  # a run's last shards are nobody's next ones
                    ahead_steps = min(ahead_steps, stop_step - 1 - step)
                wanted = self.plan.shards_ahead(step, self._lanes, steps=ahead_steps)
                # First, so that what is no longer wanted makes room; a rank that shares a lane
                # may have rows of a shard that is not among those of its lanes.
                used = {pack.shard for packs in mine for pack in packs}
                self._source.keep({*wanted, *used})
                ahead.want(wanted)
                yield self._load(plan, mine)
                step += 1
        finally:
            ahead.close()

    def _load(self, plan: StepPlan, micro_packs: Sequence[Sequence[Pack]]) -> StepBatch:
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
                    uncached_temperature=self._uncached_temperature,
                    score=self._score,
                )
                for packs in micro_packs
            ],
            num_loss_tokens=plan.num_loss_tokens,
            num_tokens=plan.num_tokens,
            num_skipped_rows=plan.num_skipped_rows,
            damaged=tuple(damaged),
        )

    def _read(
        self, packs: Sequence[Pack], step: int
    ) -> tuple[dict[tuple[int, int], CachedSequence], list[SkippedShard]]:
        """Read the rows of packs with one call per shard; return what is damaged apart."""
        wanted: dict[int, list[int]] = {}
        for pack in packs:
            wanted.setdefault(pack.shard, []).extend(pack.rows)
        found: dict[tuple[int, int], CachedSequence] = {}
        damaged: list[SkippedShard] = []
        for shard, rows in wanted.items():
            try:
                sequences = self._source.read_rows(shard, rows)
            except ShardDamaged as error:
                if self._settings.on_damaged_shard == "stop":
                    raise
                name, count = self._source.shard_name(shard), self._source.shard_rows()[shard]
                damaged.append(SkippedShard(shard, step, name, count, error.reason))
                continue
            found.update(zip([(shard, row) for row in rows], sequences, strict=True))
        return found, damaged
