"""A cache as a torch dataset of packed batches, for trainers of one's own.

Shapes: T tokens of all sequences in a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.api.targets import TeacherTargets, targets_of
from pipeline.cache.io.reader import Cache, open_cache
from pipeline.config.mistakes import validated
from pipeline.data.collate import Batch
from pipeline.data.order.totals import split_totals
from pipeline.data.settings import DataSettings
from pipeline.data.stream.heldout_stream import heldout_stream
from pipeline.data.stream.train_stream import TrainStream
from pipeline.data.temperature import temperature_index
from pipeline.errors import ConfigError

__all__ = ["ModelInputs", "TargetBatch", "TargetDataset"]

_NO_LABEL = -100
"""What transformers leaves out of a loss."""


class ModelInputs(TypedDict):
    """What a model of transformers is called with, for sequences laid end to end.

    Positions that restart keep attention within a sequence where there is no attention mask AND no
    cache of keys and values; with a cache, sequences would see their neighbours.
    """

    input_ids: Tensor
    """int64 [1, T]."""
    position_ids: Tensor
    """int64 [1, T]; 0 at the start of each sequence."""
    use_cache: bool
    """False."""


class TargetBatch(TypedDict):
    """One batch."""

    inputs: ModelInputs
    """For `model(**batch["inputs"])`."""
    labels: Tensor
    """int64 [1, T]; the token itself where it is supervised, else -100; not shifted."""
    targets: TeacherTargets
    """Of the supervised tokens."""


class TargetDataset(IterableDataset[TargetBatch]):
    """Batches of a cache, in the order in which the trainer of this project reads them.

    Iterating gives one epoch; the next iteration is the next epoch. Training batches are packs of
    at most `tokens` tokens; the order is arithmetic of the seed, so that `load_state_dict` goes on
    at any batch without reading what came before. Put it into a
    `DataLoader(dataset, batch_size=None)`: a thread reads ahead, so the loader needs no workers.
    Each rank of `torch.distributed` (or of a launcher's environment) gets its own batches, equally
    many on all of them; a rank's last one may have no supervised token.
    """

    def __init__(
        self,
        cache: Cache | str | os.PathLike[str],
        split: str = "train",
        *,
        temperature: float = 1.0,
        tokens: int | None = None,
        seed: int = 42,
        top_k: int | None = None,
        tau_factor: float | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Plan the batches from the lengths of rows; reads no row.

        Args:
            cache: an open one, or its folder or address.
            split: `train`, shuffled; or `heldout`, in the order of the files.
            temperature: one of the cache's.
            tokens: most tokens of a batch; none takes the longest sequence there can be.
            seed: of the order.
            top_k: use only the largest entries of a top-k target.
            tau_factor: subsample a sampled target; see `Cache.source`.
            rank: of this process; none asks torch.distributed, then `RANK`.
            world_size: of all processes; none asks likewise.

        Raises:
            CacheError: no complete cache, no rows, or fewer entries than asked for.
            ConfigError: a temperature that is not cached, another split, or a row longer than a
                batch.
        """
        self.cache = open_cache(str(cache)) if isinstance(cache, str | os.PathLike) else cache
        if split not in ("train", "heldout"):
            raise ConfigError(f"split {split!r}", expected="train or heldout")
        manifest = self.cache.manifest
        temperature_index(manifest.temperatures, temperature)
        self.temperature = temperature
        self.split = split
        self.rank, self.world_size = _place(rank, world_size)
        self.epoch = 0
        self._start: int | None = None
        self._next = 0
        self._rows = self.cache.source(split, top_k=top_k, tau_factor=tau_factor)
        longest = manifest.identity.get("corpus", {}).get("max_length")
        self.tokens = tokens or int(longest or split_totals(self._rows).longest)
        self._stream: TrainStream | None = None
        spec = self.cache.spec.of_split(split)
        if top_k is not None:  # of sampled held-out rows too
            spec = replace(spec, rule=None)
        self._about: dict[str, Any] = {
            "vocab_size": int(manifest.codec["vocab_size"]),
            "sampled_log_step": spec.quantisation.sampled_step if spec.rule else 0.0,
            "rule": spec.rule,
        }
        if split == "train":
            self._stream = TrainStream(
                self._rows,
                validated(DataSettings, {"pack_length": self.tokens}),
                seed=seed,
                packs_per_step=self.world_size,
                rank=self.rank,
                world_size=self.world_size,
                accumulation=1,
                pack_length=self.tokens,
                temperature=temperature,
            )

    def __len__(self) -> int:
        """Return the batches of an epoch, on each rank."""
        if self._stream is not None:
            return self._stream.steps_per_epoch
        from pipeline.data.heldout import heldout_parts

        parts = heldout_parts(self._rows, self.tokens, rank=self.rank, world_size=self.world_size)
        return len(parts)

    def __iter__(self) -> Iterator[TargetBatch]:
        """Yield the batches of one epoch, from its start or from the state that was loaded.

        Raises:
            CacheError: a shard is missing or damaged.
            ConfigError: a loader of several workers, each of which would give every batch.
            StoreError: the store fails.
        """
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ConfigError(
                f"a DataLoader with {worker.num_workers} workers",
                expected="num_workers=0: the dataset reads ahead in a thread of its own",
            )
        if self._stream is None:
            with heldout_stream(
                self._rows,
                tokens_per_batch=self.tokens,
                temperature=self.temperature,
                rank=self.rank,
                world_size=self.world_size,
            ) as batches:
                yield from map(self._batch, batches)
            return
        size = self._stream.steps_per_epoch
        first = self.epoch * size if self._start is None else self._start
        self._start = None
        last = (first // size + 1) * size
        with self._stream.iterate(first, last) as steps:
            for step in steps:
                self._next = step.step + 1
                yield self._batch(step.micro_batches[0])
        self.epoch = last // size

    def state_dict(self) -> dict[str, int]:
        """Return where the iteration is: the number of the next batch, over all epochs."""
        return {"next_batch": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on where `state_dict` was taken."""
        self._start = self._next = int(state["next_batch"])
        self.epoch = self._start // max(1, len(self))

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch, from 0 on."""
        self.epoch, self._start = epoch, None
        self._next = epoch * len(self)

    def _batch(self, batch: Batch) -> TargetBatch:
        labels_1T = torch.full_like(batch.input_ids_1T, _NO_LABEL)
        labels_1T[0, batch.label_index_N + 1] = batch.label_ids_N
        return {
            "inputs": {
                "input_ids": batch.input_ids_1T,
                "position_ids": batch.position_ids_1T,
                "use_cache": False,
            },
            "labels": labels_1T,
            "targets": targets_of(batch, **self._about),
        }


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and size: as given, of torch.distributed, of a launcher, or of one process."""
    if (rank is None) != (world_size is None):
        raise ConfigError(
            f"rank {rank} and world_size {world_size}", expected="both of them, or none"
        )
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank}", expected=f"0 to {world_size - 1} of {world_size}")
    return rank, world_size
