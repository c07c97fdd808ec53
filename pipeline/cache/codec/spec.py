"""Codec "ranked": its description, its columns, and rows as integers.

Ids are replaced by their rank in an order of the vocabulary that lists the shard's frequent tokens
first, and written as gaps between ascending ranks (`kernels.py`); numbers are quantised
(`pipeline/sampling/quantisation.py`). Each kind of byte is a separate Parquet column, so that
zstd's entropy coder sees one distribution at a time and readers read only what they need. FORMAT.md
is normative.

Legend: S rows, N supervised positions of all of them, E entries, G temperatures, V vocabulary.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import zstandard
from numpy.typing import NDArray

from pipeline.cache.codec.largest import LARGEST_COLUMN, Candidates
from pipeline.cache.codec.requested import REQUESTED_COLUMNS, new_requested
from pipeline.cache.codec.written import WRITTEN_COLUMNS
from pipeline.errors import CacheError
from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.quantisation import Quantisation

__all__ = [
    "CODEC_NAME",
    "COLUMNS",
    "MAX_VOCAB_SIZE",
    "STREAMS",
    "VALUE_STREAMS",
    "Blobs",
    "CodecSpec",
    "CodedRows",
    "Run",
    "frequency_classes",
    "order_of_classes",
    "pack_classes",
    "unpack_order",
]  # fmt: skip

MAX_VOCAB_SIZE = (1 << 19) - 1
"""The largest step between ranks has 18 bits below its leading one."""
CODEC_NAME = "ranked"
STREAMS = 4
VALUE_STREAMS = 3
COLUMNS = (
    "always_kept_counts", "sampled_counts", "counts_high",
    *(f"always_kept_ids_{stream}" for stream in range(STREAMS)),
    "always_kept_bits", "always_kept_values",
    *(f"sampled_ids_{stream}" for stream in range(STREAMS)), "sampled_bits",
    *(f"sampled_values_{stream}" for stream in range(VALUE_STREAMS)),
    "label_logprob", "log_z", "log_z_high", "entropy", "tail",
)  # fmt: skip
_U8 = NDArray[np.uint8]
_OF_SPLIT = ("inclusion_rule", "quantisation")
"""Members of a codec's JSON form that the held-out shards may have of their own."""
_Integer = TypeVar("_Integer", bound=np.integer[Any])


@dataclass(frozen=True, slots=True)
class Blobs:
    """One byte column of S rows: row s is `data[starts[s] : starts[s + 1]]`."""

    data: _U8
    starts: NDArray[np.int64]
    """S + 1 offsets, the first 0."""

    @classmethod
    def of_lengths(cls, data: _U8, lengths_S: NDArray[np.int64]) -> Blobs:
        """Cut bytes into rows."""
        return cls(data, np.concatenate([[0], np.cumsum(lengths_S)]).astype(np.int64))

    @property
    def lengths_S(self) -> NDArray[np.int64]:
        """Bytes of each row."""
        return self.starts[1:] - self.starts[:-1]  # numpy.diff takes longer, at a few rows


@dataclass(frozen=True, slots=True)
class Run:
    """Entries of one kind of N positions, as integers."""

    counts_N: NDArray[np.int64]
    ids_E: NDArray[np.int32]
    codes_E: _U8
    """Quantisation codes of log p."""

    def of_positions(self, values_N: NDArray[Any]) -> NDArray[Any]:
        """Return for each entry the value of its position."""
        return np.repeat(values_N, self.counts_N, axis=0)

    def where(self, kept_E: NDArray[np.bool_]) -> Run:
        """Return the entries that are kept."""
        owner_E = self.of_positions(np.arange(len(self.counts_N)))
        counts_N = np.bincount(owner_E[kept_E], minlength=len(self.counts_N)).astype(np.int64)
        return Run(counts_N, self.ids_E[kept_E], self.codes_E[kept_E])


@dataclass(frozen=True, slots=True)
class CodedRows:
    """S rows as integers: decoded from bytes, but not yet dequantised.

    Rows are moved to other shards and subsampled in this form, so that nothing is rounded twice.
    """

    positions_S: NDArray[np.int64]
    """Supervised positions of each row."""
    always_kept: Run
    """Under an inclusion rule without the label, which is always an entry and whose id is not
    stored."""
    sampled: Run
    label_N: _U8
    log_z_NG: NDArray[np.int16]
    """Of the temperatures other than 1."""
    entropy_NG: _U8
    tail_N: _U8
    """Empty under an inclusion rule."""
    written_N: NDArray[np.uint16] | None = None
    """Codes of the log-probs with which the text was written; None: not recorded."""
    largest_N: NDArray[np.int32] | None = None
    """Ids of the largest entries, of the always-kept run; -1: the label under an inclusion rule, no
    entry without one. None: not known."""
    requested: Run | None = None
    """Requested entries, under an inclusion rule without the label; None: nothing was requested."""

    @classmethod
    def join(cls, parts: Sequence[CodedRows]) -> CodedRows:
        """Return the rows of all parts."""
        if len(parts) == 1:
            return parts[0]

        def joined(kind: str) -> Run:
            runs = [getattr(part, kind) for part in parts]
            return Run(
                np.concatenate([run.counts_N for run in runs]),
                np.concatenate([run.ids_E for run in runs]),
                np.concatenate([run.codes_E for run in runs]),
            )

        return cls(
            np.concatenate([part.positions_S for part in parts]),
            joined("always_kept"),
            joined("sampled"),
            np.concatenate([part.label_N for part in parts]),
            np.concatenate([part.log_z_NG for part in parts]),
            np.concatenate([part.entropy_NG for part in parts]),
            np.concatenate([part.tail_N for part in parts]),
            _joined([part.written_N for part in parts]),
            _joined([part.largest_N for part in parts]),
            joined("requested") if all(part.requested is not None for part in parts) else None,
        )

    def candidates(self, spec: CodecSpec) -> Candidates:
        """Return the entries of which the largest of each position is one."""
        run = self.always_kept
        label_N = self.label_N[: 0 if spec.rule is None else None]
        return Candidates(run.counts_N, run.ids_E, run.codes_E, label_N)

    def num_scheme_entries(self, spec: CodecSpec) -> int:
        """Entries that the scheme kept; under an inclusion rule each position's label is one."""
        label = len(self.label_N) if spec.rule is not None else 0
        return len(self.always_kept.ids_E) + len(self.sampled.ids_E) + label

    def num_entries(self, spec: CodecSpec) -> int:
        """Entries of all rows as a reader returns them: requested ones that are new among them."""
        entries = self.num_scheme_entries(spec)
        if self.requested is None:
            return entries
        others = [(run.counts_N, run.ids_E) for run in (self.always_kept, self.sampled)]
        return entries + new_requested(self.requested.counts_N, self.requested.ids_E, others)

    def kept_mass_N(self, spec: CodecSpec) -> NDArray[np.float64]:
        """Return the mass of each position's always-kept entries at temperature 1.

        Requested ones are not the scheme's, and do not count.
        """
        if spec.rule is None:
            return 1.0 - spec.quantisation.tail_values().astype(np.float64)[self.tail_N]
        mass_K = np.exp(spec.quantisation.always_kept_values().astype(np.float64))
        owner_E = self.always_kept.of_positions(np.arange(len(self.label_N)))
        mass_N = mass_K[self.label_N] + np.bincount(
            owner_E, mass_K[self.always_kept.codes_E], minlength=len(self.label_N)
        )
        return np.minimum(mass_N, 1.0)


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """Everything a reader needs to decode; stored in every shard and in the manifest."""

    vocab_size: int
    """Rows of the teacher's head; every id is below it."""
    rule: InclusionRule | None = None
    """How entries that are not always kept were sampled; None: all are always kept, and the label
    need not be an entry."""
    quantisation: Quantisation = field(default_factory=Quantisation)
    name: str = CODEC_NAME
    written_logprobs: bool = False
    """Whether shards hold the log-probs with which the text was written."""
    requested_entries: bool = False
    """Whether shards hold entries that were asked for by id."""
    largest_known: bool = False
    """Whether shards say which of several entries of the lowest code is the largest."""
    heldout: CodecSpec | None = None
    """Of the shards of `heldout`, where their entries are of another scheme: equal in all but rule
    and quantisation. None: they are as those of `train`."""

    def __post_init__(self) -> None:
        """Reject a vocabulary whose ids do not fit.

        Raises:
            CacheError: 2^19 tokens or more.
        """
        if not 1 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise CacheError(
                f"a vocabulary of {self.vocab_size} tokens",
                expected=f"1 to {MAX_VOCAB_SIZE} (2^19 - 1)",
            )

    def of_split(self, split: str) -> CodecSpec:
        """Return the codec of one split's shards; `heldout` is None there."""
        if self.heldout is None:
            return self
        return self.heldout if split == "heldout" else replace(self, heldout=None)

    @property
    def tau_units(self) -> int:
        """Tau in units of 2^-16 where the inclusion rule covers temperature 1 alone, else 0.

        There the expected number of sampled entries follows from the mass outside the always-kept.
        """
        if self.rule is None or self.rule.covered != (1.0,):
            return 0
        return max(1, int(np.floor(65536 * max(self.rule.taus) + 0.5)))

    @property
    def columns(self) -> tuple[str, ...]:
        """The byte columns of a shard."""
        return (
            *COLUMNS,
            *((LARGEST_COLUMN,) if self.largest_known else ()),
            *(WRITTEN_COLUMNS if self.written_logprobs else ()),
            *(REQUESTED_COLUMNS if self.requested_entries else ()),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; what a cache lacks is not in it."""
        data: dict[str, Any] = {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "inclusion_rule": None if self.rule is None else self.rule.to_json(),
            "quantisation": self.quantisation.to_json(),
        }
        if self.written_logprobs:
            data["written_logprobs"] = True
        if self.requested_entries:
            data["requested_entries"] = True
        if self.largest_known:
            data["largest_known"] = True
        if self.heldout is not None:
            own = self.heldout.to_json()
            data["heldout"] = {name: own[name] for name in _OF_SPLIT}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CodecSpec:
        """Read the JSON form.

        Raises:
            CacheError: values it cannot have.
        """
        try:
            rule, heldout = data["inclusion_rule"], data.get("heldout")
            if heldout is not None:
                heldout = cls.from_json(
                    {
                        name: heldout.get(name, value) if name in _OF_SPLIT else value
                        for name, value in data.items()
                        if name != "heldout"
                    }
                )
            return cls(
                vocab_size=int(data["vocab_size"]),
                rule=None if rule is None else InclusionRule.from_json(rule),
                quantisation=Quantisation.from_json(data["quantisation"]),
                written_logprobs=bool(data.get("written_logprobs", False)),
                requested_entries=bool(data.get("requested_entries", False)),
                largest_known=bool(data.get("largest_known", False)),
                heldout=heldout,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CacheError(f"the cache's codec cannot be read ({error})") from None


def _joined(parts: Sequence[NDArray[_Integer] | None]) -> NDArray[_Integer] | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def frequency_classes(coded: CodedRows, vocab_size: int) -> _U8:
    """Return each token's class: 0 if no run holds it, else 1 + floor(2 log2(times)).

    In integers, so that the result is the same on every machine.
    """
    requested = [] if coded.requested is None else [coded.requested.ids_E]
    ids_E = np.concatenate([coded.always_kept.ids_E, coded.sampled.ids_E, *requested])
    squares_V = np.bincount(ids_E, minlength=vocab_size).astype(np.int64) ** 2
    return np.searchsorted(2 ** np.arange(62, dtype=np.int64), squares_V, "right").astype(np.uint8)


def order_of_classes(classes_V: _U8) -> NDArray[np.int32]:
    """Return the token of each rank: by falling class, within a class by id."""
    return np.argsort(255 - classes_V, kind="stable").astype(np.int32)


def pack_classes(classes_V: _U8) -> bytes:
    """Return the classes as a shard's metadata stores them: one zstd frame, a byte per token.

    In base64: Parquet's metadata is text, and polars cannot read a file where it is not.
    """
    return base64.b64encode(zstandard.ZstdCompressor(level=9).compress(classes_V.tobytes()))


@lru_cache(maxsize=32)
def unpack_order(packed: bytes, vocab_size: int) -> NDArray[np.int32]:
    """Return the order that a shard's metadata describes; the same array for the same bytes.

    Raises:
        CacheError: damaged.
    """
    try:
        frame = base64.b64decode(packed, validate=True)
        # The size in the frame's header first: decompressing a larger one would allocate that much.
        fits = zstandard.frame_content_size(frame) == vocab_size
        data = zstandard.ZstdDecompressor().decompress(frame) if fits else b""
    except (binascii.Error, zstandard.ZstdError):
        data = b""
    if len(data) != vocab_size:
        raise CacheError("the order of the vocabulary in the shard's metadata is damaged")
    order_V = order_of_classes(np.frombuffer(data, np.uint8))
    order_V.flags.writeable = False
    return order_V
