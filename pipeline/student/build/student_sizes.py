"""The sizes of all rows in another tokenizer's tokens: counted once, by all cores, and stored.

A row is tokenised again to know its length: 0.1 M tokens a second and core. The result depends on
the cache's text and the two tokenizers alone, so it is stored in the machine's local folder under a
digest of these, where all ranks of a node and all later runs open it. Not beside the cache: stage
two does not write there, and often may not; not in the run's folder: each run of a sweep would
count again.

Shapes: R rows of a split, in the order of its shards.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache.io.reader import Cache, open_cache
from pipeline.config import fingerprint
from pipeline.data.retokenise import Aligner, student_sizes
from pipeline.models.tokenizer import load_tokenizer, tokenizer_files, tokenizer_from_files
from pipeline.progress import Progress
from pipeline.storage.local_folder import local_folder, locked
from pipeline.storage.parallel import usable_cores
from pipeline.student.build.aligner import make_aligner

__all__ = ["SizeCounter"]

_log = logging.getLogger(__name__)

_VERSION = 1
"""Of the alignment; another one has other sizes."""
_FEW_TOKENS = 2_000_000
"""Counted by this process: others take seconds to start."""

Sizes = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SizeCounter:
    """Counts the rows of a cache in a student's tokens."""

    cache: Cache
    student_folder: Path
    head_rows: int
    """Of the student; see `make_aligner`."""
    aligner: Aligner
    processes: int | None = None
    """None: as many as there are cores."""

    def sizes(self, split: str) -> Sizes:
        """Return `student_sizes` of every row of a split, [R, 2]: stored ones, or counted now.

        Raises:
            ShardDamaged: a shard is missing or damaged.
            ModelError: the student's tokenizer gives a token that its head has no row for.
        """
        folder = local_folder("student-sizes")
        if folder is None:
            _log.warning(
                "no local folder can be written to: each process counts the rows for itself; set "
                "XDG_CACHE_HOME or TMPDIR to a folder on a local disk"
            )
            return self._count(split)
        file = folder / f"{self._digest(split)[:32]}.npy"
        with locked(file.with_suffix(".lock")):
            if (stored := self._stored(file, split)) is not None:
                return stored
            sizes_R2 = self._count(split)
            try:
                _write(file, sizes_R2)
            except OSError as error:
                _log.warning("%s cannot be written (%s): later runs count again", file, error)
        stored = self._stored(file, split)
        return sizes_R2 if stored is None else stored

    def _digest(self, split: str) -> str:
        manifest = self.cache.manifest
        student = tokenizer_files(load_tokenizer(self.student_folder))
        return fingerprint(
            {
                "version": _VERSION,
                # Of the records, which hold the checksum of each shard.
                "segments": [segment.xxh3_128 for segment in manifest.of_split(split)],
                "teacher": dict(manifest.tokenizer_xxh3_128),
                "student": {name: data.hex() for name, data in sorted(student.items())},
                "head_rows": self.head_rows,
            }
        )

    def _stored(self, file: Path, split: str) -> Sizes | None:
        """Return a stored file, mapped; None where there is none or it is not whole."""
        rows = self.cache.manifest.total(split).rows
        try:
            found = np.load(file, mmap_mode="r")
        except (OSError, ValueError):
            return None
        return found if found.shape == (rows, 2) and found.dtype == np.int32 else None

    def _count(self, split: str) -> Sizes:
        cache = self.cache
        source = cache.source(split)
        shards = range(len(source.shards))
        tokens = cache.manifest.total(split).tokens
        parts: list[Sizes] = []
        with self._counting(split, tokens) as counts:
            progress = Progress(
                len(shards), unit="shards", description=f"lengths of {split} rows",
                enabled=tokens > _FEW_TOKENS,
            )  # fmt: skip
            with progress:
                for shard, found in zip(shards, counts(shards), strict=True):
                    if found is None:  # says what is wrong with it
                        source.open(shard)
                        found = _count_shard(cache, split, shard, self.aligner)
                    parts.append(found)
                    progress.advance(1)
        return np.concatenate([np.zeros((0, 2), np.int32), *parts])

    @contextlib.contextmanager
    def _counting(
        self, split: str, tokens: int
    ) -> Iterator[Callable[[range], Iterator[Sizes | None]]]:
        """Give a function that counts shards, here or in other processes."""
        processes = self.processes or usable_cores()
        if processes == 1 or (self.processes is None and tokens <= _FEW_TOKENS):
            yield lambda shards: (
                _count_shard(self.cache, split, shard, self.aligner) for shard in shards
            )
            return
        # Spawned: a forked child of a process with threads (torch's, fsspec's) can hang.
        with ProcessPoolExecutor(
            processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_open_worker,
            initargs=(self.cache.store.url, str(self.student_folder), self.head_rows, split),
        ) as pool:
            yield lambda shards: pool.map(_work, shards)


_worker: dict[str, Any] = {}


def _open_worker(url: str, folder: str, head_rows: int, split: str) -> None:
    cache = open_cache(url)
    teacher = tokenizer_from_files(cache.tokenizer_files())
    student = load_tokenizer(Path(folder))
    aligner = make_aligner(Path(folder), teacher, student, rows=head_rows)
    _worker["count"] = lambda shard: _count_shard(cache, split, shard, aligner)


def _work(shard: int) -> Sizes | None:
    """Count a shard; None where that fails, so that the error is raised where it can be told."""
    try:
        found: Sizes = _worker["count"](shard)
    except Exception:
        return None
    return found


def _count_shard(cache: Cache, split: str, shard: int, aligner: Aligner) -> Sizes:
    """Count the rows of a shard; of its file the ids and the masks alone are read."""
    record = cache.records(split)[shard]
    try:
        with cache.store.open(record.path) as file:
            table = pq.read_table(
                file,
                columns=["input_ids", "loss_mask"],
                use_threads=False,
                page_checksum_verification=True,
            )
    except (pa.ArrowException, OSError):
        cache.source(split).open(shard)  # says what is wrong with it
        raise
    ids, masks = (table.column(name).combine_chunks() for name in ("input_ids", "loss_mask"))
    sizes = [
        student_sizes(np.asarray(row.values, np.int32), np.asarray(mask.values, np.bool_), aligner)
        for row, mask in zip(ids, masks, strict=True)
    ]
    return np.asarray(sizes, np.int32).reshape(-1, 2)


def _write(file: Path, sizes_R2: Sizes) -> None:
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as target:
            np.save(target, sizes_R2)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
