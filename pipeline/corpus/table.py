"""All samples of a corpus at constant memory: written to disk, read back on demand.

A sample costs 4.125 bytes a token and 60 bytes on the scratch disk, and nothing in memory. Legend:
N samples of a block, L tokens of a sample.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.sample import Sample, SplitName
from pipeline.storage.scratch import ScratchFile

__all__ = ["SampleTable", "SampleWriter"]

_SPLITS: tuple[SplitName, ...] = ("train", "heldout")
"""A split's number is its index here."""
_BLOCK = 512
_SPREAD = 16
"""Records are read in one call if that reads at most this many times the needed bytes."""

# `before`: tokens of the same split before this sample.
_RECORD = np.dtype(
    [
        ("sample_id", "u1", 16), ("offset", "<i8"), ("before", "<i8"), ("source_index", "<i8"),
        ("length", "<i4"), ("loss_tokens", "<i4"), ("part", "<i4"),
    ]
)  # fmt: skip
_PACKED_RECORD = struct.Struct("<16s3q3i")
_ORDER = np.dtype("<i8")
_PACKED_ORDER = struct.Struct("<q")

assert _RECORD.itemsize == _PACKED_RECORD.size


class _Files:
    """The files of one corpus's samples."""

    def __init__(self) -> None:
        self.tokens = ScratchFile("tokenised samples")
        self.records = [ScratchFile("tokenised samples") for _ in _SPLITS]
        self.order = ScratchFile("tokenised samples")
        """Of each sample in source order: its place within its split, times two, plus the split."""
        self.num_tokens = [0, 0]

    def num_samples(self, split: int) -> int:
        return self.records[split].size // _RECORD.itemsize


class SampleWriter:
    """Writes the samples of a corpus one by one, in source order."""

    def __init__(self) -> None:
        """Open the scratch files.

        Raises:
            ResourceError: there is no folder for temporary files.
        """
        self._files = _Files()
        self.num_loss_tokens = 0
        """Supervised tokens of all samples so far."""

    def num_samples(self, split: str) -> int:
        """Return the samples of one split so far."""
        return self._files.num_samples(_number(split))

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples so far."""
        return sum(self._files.num_tokens)

    def append(self, sample: Sample) -> None:
        """Add a sample; keeps no reference to its arrays.

        Raises:
            ResourceError: the scratch disk is full.
        """
        files, split = self._files, _number(sample.split)
        length = int(sample.input_ids.size)
        loss_tokens = int(np.count_nonzero(sample.loss_mask))
        ids = np.ascontiguousarray(sample.input_ids, "<i4").tobytes()
        offset = files.tokens.append(ids + np.packbits(sample.loss_mask).tobytes())
        files.order.append(_PACKED_ORDER.pack(files.num_samples(split) * 2 + split))
        files.records[split].append(
            _PACKED_RECORD.pack(
                bytes.fromhex(sample.sample_id), offset, files.num_tokens[split],
                sample.source_index, length, loss_tokens, sample.part,
            )
        )  # fmt: skip
        files.num_tokens[split] += length
        self.num_loss_tokens += loss_tokens

    def finish(self) -> SampleTable:
        """Return the table. Nothing may be added afterwards.

        Raises:
            ResourceError: the scratch disk is full.
        """
        files = self._files
        for file in (files.tokens, files.order, *files.records):
            file.flush()
        return SampleTable(files, None, range(files.order.size // _ORDER.itemsize))


@dataclass(frozen=True, slots=True)
class SampleTable(Sequence[Sample]):
    """Samples of a corpus, or a part of them; each is read on access.

    A slice is another table over the same files and takes 200 bytes, whatever its length. Tables
    of the same places in the same files are equal. Safe to read from several threads.
    """

    _files: _Files = field(repr=False)
    _split: int | None
    """The split whose samples these are; None: of all samples, in source order."""
    _places: range

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> SampleTable:
        """Return a table of samples in memory."""
        writer = SampleWriter()
        for sample in samples:
            writer.append(sample)
        return writer.finish()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> SampleTable: ...
    def __getitem__(self, index: int | slice) -> Sample | SampleTable:
        """Read one sample, or return a table of several."""
        if isinstance(index, slice):
            return SampleTable(self._files, self._split, self._places[index])
        place = self._places[index]
        return next(self._read(range(place, place + 1)))

    def __iter__(self) -> Iterator[Sample]:
        """Read the samples one after the other."""
        for block in self._blocks():
            yield from self._read(block)

    def of_split(self, split: str) -> SampleTable:
        """Return the samples of one split of the corpus, in source order."""
        number = _number(split)
        return SampleTable(self._files, number, range(self._files.num_samples(number)))

    def with_heldout(self, rows: Container[int]) -> SampleTable:
        """Return a copy in which the samples of some rows of the source are held out."""
        writer = SampleWriter()
        for sample in self:
            held = sample.source_index in rows
            writer.append(replace(sample, split="heldout") if held else sample)
        return writer.finish()

    @property
    def num_loss_tokens(self) -> int:
        """Supervised tokens of these samples; reads no sample."""
        return sum(int(self._records(block)["loss_tokens"].sum()) for block in self._blocks())

    @property
    def num_tokens(self) -> int:
        """Tokens of these samples; reads no sample."""
        places = self._places
        if self._split is None or places.step != 1:
            return sum(int(lengths_N.sum()) for lengths_N in self.lengths())
        if not places:
            return 0
        first, last = (self._records(range(p, p + 1))[0] for p in (places[0], places[-1]))
        return int(last["before"] + last["length"] - first["before"])

    def lengths(self) -> Iterator[NDArray[np.int64]]:
        """Yield the tokens of each sample, in blocks [N]."""
        for block in self._blocks():
            yield self._records(block)["length"].astype(np.int64)

    def sample_ids(self) -> Iterator[str]:
        """Yield each sample's id; reads no tokens."""
        for block in self._blocks():
            digits = self._records(block)["sample_id"].tobytes().hex()
            yield from (digits[at : at + 32] for at in range(0, len(digits), 32))

    def _blocks(self) -> Iterator[range]:
        return (self._places[at : at + _BLOCK] for at in range(0, len(self._places), _BLOCK))

    def _read(self, places: range) -> Iterator[Sample]:
        splits = self._splits(places)
        for split, record in zip(splits, self._records(places).tolist(), strict=True):
            sample_id, offset, _, source_index, length, _, part = record
            raw = np.empty(4 * length + -(-length // 8), np.uint8)
            self._files.tokens.read_into(raw, offset)
            yield Sample(
                sample_id=bytes(sample_id).hex(),
                split=split,
                input_ids=raw[: 4 * length].view("<i4"),
                loss_mask=np.unpackbits(raw[4 * length :], count=length).view(np.bool_),
                source_index=source_index,
                part=part,
            )

    def _splits(self, places: range) -> list[SplitName]:
        if self._split is not None:
            return [_SPLITS[self._split]] * len(places)
        return [_SPLITS[order & 1] for order in self._order(places).tolist()]

    def _order(self, places: range) -> NDArray[np.int64]:
        return _pick(self._files.order, _ORDER, np.arange(places.start, places.stop, places.step))

    def _records(self, places: range) -> NDArray[Any]:
        """Read the records [N] of a block."""
        if self._split is not None:
            file = self._files.records[self._split]
            return _pick(file, _RECORD, np.arange(places.start, places.stop, places.step))
        order_N = self._order(places)
        records_N = np.empty(len(places), _RECORD)
        for split, file in enumerate(self._files.records):
            mine_N = (order_N & 1) == split
            records_N[mine_N] = _pick(file, _RECORD, order_N[mine_N] >> 1)
        return records_N


def _number(split: str) -> int:
    return next(number for number, name in enumerate(_SPLITS) if name == split)


def _pick(file: ScratchFile, dtype: np.dtype[Any], places_N: NDArray[np.int64]) -> NDArray[Any]:
    """Read the items at `places_N` (ascending or descending) of a file of items."""
    if not places_N.size:
        return np.empty(0, dtype)
    low, high = sorted((int(places_N[0]), int(places_N[-1])))
    if high - low < _SPREAD * places_N.size:
        span = np.empty(high - low + 1, dtype)
        file.read_into(span, low * dtype.itemsize)
        return span[places_N - low]
    items_N = np.empty(places_N.size, dtype)
    for number, place in enumerate(places_N.tolist()):
        file.read_into(items_N[number : number + 1], place * dtype.itemsize)
    return items_N
