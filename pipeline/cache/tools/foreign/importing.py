"""Files of another project to a cache: all rows are looked at first, then written as shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.io.writer import encode_shard
from pipeline.cache.layout.inventory import Plan, PlannedRows, encode_plan
from pipeline.cache.layout.manifest import Manifest
from pipeline.cache.layout.records import ShardRecord
from pipeline.cache.layout.schema import FORMAT_VERSION
from pipeline.cache.tools.derive import fill, finish, reserve_folder
from pipeline.cache.tools.foreign.columns import schema_mistakes
from pipeline.cache.tools.foreign.distillkit import Compression
from pipeline.cache.tools.foreign.files import ForeignFile
from pipeline.cache.tools.foreign.formats import FORMATS, LABELS_OUTSIDE, raw_rows
from pipeline.cache.tools.foreign.targets import Imported, imported_row
from pipeline.cache.tools.foreign.tokenizer import ForeignTokenizer
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["ImportSpec", "import_files"]

_NO_TAIL = 5e-4
"""Where no position lacks more than this to 1, the entries were made to sum to 1."""


@dataclass(frozen=True, slots=True)
class ImportSpec:
    """What an import is told, for the file cannot tell it."""

    format: str
    tokenizer: ForeignTokenizer
    vocab_size: int
    teacher: str
    heldout_fraction: float
    shard_tokens: int
    compression: Compression | None = None


@dataclass(slots=True)
class _Seen:
    """What looking at all rows has found."""

    tokens: list[NDArray[np.int64]] = field(default_factory=list)
    """Of each row, file by file."""
    checksums: list[str] = field(default_factory=list)
    mistakes: dict[str, tuple[str, int]] = field(default_factory=dict)
    """First place and number, by what is wrong."""
    labels_outside: int = 0
    rescaled: int = 0
    largest_gap: float = 0.0
    most_entries: int = 0

    def mistake(self, what: str, place: str) -> None:
        first, count = self.mistakes.get(what, (place, 0))
        self.mistakes[what] = first, count + 1

    def lines(self) -> list[str]:
        """Return the mistakes, each with its first place and how many more there are."""
        return [
            what + (f": {first}" if first else "") + (f", and {count - 1} more" * (count > 1))
            for what, (first, count) in self.mistakes.items()
        ]

    def add(self, row: Imported) -> None:
        self.labels_outside += row.labels_outside
        self.rescaled += row.rescaled
        self.largest_gap = max(self.largest_gap, row.largest_gap)
        self.most_entries = max(self.most_entries, row.most_entries)


@dataclass(frozen=True, slots=True)
class _Shard:
    planned: PlannedRows
    pieces: tuple[tuple[int, NDArray[np.int64]], ...]
    """Files, and the rows of each."""


def import_files(
    files: Sequence[ForeignFile],
    target: Store,
    spec: ImportSpec,
    *,
    command: str,
    on_start: Callable[[int], None] = lambda rows: None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> tuple[Manifest, int]:
    """Write the files' rows as a top-k cache; return its manifest and the labels outside entries.

    Nothing is written before every row has been looked at. The same command goes on where it
    stopped.

    Raises:
        CacheError: the files are not as their format says, with all that is wrong; the target
            holds another cache.
        StoreError: a store fails.
    """
    columns = _check_columns(files, spec.format)
    seen = _look(files, columns, spec)
    shards = _plan(seen, spec)
    identity = _identity(seen, spec)
    digest = fingerprint(identity)
    codec = CodecSpec(spec.vocab_size, largest_known=True)

    def make(place: int) -> tuple[ShardRecord, bytes]:
        shard = shards[place]
        made = [
            row
            for number, rows in shard.pieces
            for row in _rows(files[number], columns, seen.checksums[number], rows, spec)
        ]
        return encode_shard(
            [item.row for item in made],
            codec,
            split=shard.planned.split,
            index=shard.planned.index,
            temperatures=(1.0,),
            identity_digest=digest,
            tails=[item.tail_N for item in made],
        )

    planned = [shard.planned for shard in shards]
    reserve_folder(target, plan := Plan(identity, tuple(planned)), encode_plan(plan))
    on_start(sum(item.rows for item in planned))
    fill(target, planned, make, on_rows)
    manifest = finish(
        target,
        planned,
        identity=identity,
        spec=codec,
        temperatures=(1.0,),
        tokenizer=spec.tokenizer.files,
        corpus_counts=None,
        corpus_content=fingerprint(seen.checksums),
        command=command,
    )
    return manifest, seen.labels_outside


def _check_columns(files: Sequence[ForeignFile], name: str) -> dict[str, pa.DataType]:
    """Return the columns to read, checked in each file."""
    layout = FORMATS[name]
    seen = _Seen()
    for file in files:
        try:
            schema, required = file.schema(), layout.required
        except CacheError as error:  # no Parquet
            seen.mistake(error.found, "")
            continue
        kinds = dict(zip(schema.names, schema.types, strict=True))
        if layout.ids not in kinds and "struct" in str(kinds.get(layout.values)):
            required.pop(layout.ids)  # Axolotl's text form: each entry names its token
        for line in schema_mistakes(schema, required, layout.optional):
            seen.mistake(line, file.url)
    if seen.mistakes:
        raise _wrong(
            seen.lines(),
            f"Parquet with the columns of --format {name}",
            "name others with --columns; get what is damaged again",
        )
    return {**layout.required, **layout.optional}


def _look(
    files: Sequence[ForeignFile], columns: Mapping[str, pa.DataType], spec: ImportSpec
) -> _Seen:
    seen = _Seen()
    for file in files:
        checksum = file.checksum()
        if checksum in seen.checksums:
            seen.mistake("the same file as another", file.url)
        seen.checksums.append(checksum)
        tokens: list[int] = []
        for batch in file.batches(columns):
            start = len(tokens)
            try:
                for raw in raw_rows(spec.format, batch, spec.compression):
                    place = f"row {len(tokens)} of {file.url}"
                    row = raw if isinstance(raw, str) else imported_row(
                        raw, sample_id=_id(checksum, len(tokens)), vocab_size=spec.vocab_size,
                        lossy=FORMATS[spec.format].lossy,
                    )  # fmt: skip
                    if isinstance(row, str):
                        seen.mistake(row, place)
                    else:
                        seen.add(row)
                    tokens.append(0 if isinstance(raw, str) else raw.input_ids_L.size)
            except ValueError as error:
                seen.mistake(str(error), f"row {len(tokens)} or later of {file.url}")
                tokens += [0] * (start + batch.num_rows - len(tokens))
        seen.tokens.append(np.array(tokens, np.int64))
    if seen.mistakes:
        raise _wrong(
            seen.lines(),
            f"rows as --format {spec.format} has them",
            "correct the files, or --tokenizer and --vocab-size",
        )
    if not sum(part.size for part in seen.tokens):
        raise CacheError(f"{files[0].store.url}: no row in {len(files)} files", expected="rows")
    return seen


def _wrong(lines: Sequence[str], expected: str, do: str) -> CacheError:
    if len(lines) == 1:
        return CacheError(lines[0], expected=expected, do=do)
    listed = "".join(f"\n  - {line}" for line in lines)
    return CacheError(f"{len(lines)} mistakes, expected {expected} ({do}):{listed}")


def _id(checksum: str, row: int) -> str:
    return xxhash.xxh3_128_hexdigest(f"{checksum}:{row}".encode())


def _plan(seen: _Seen, spec: ImportSpec) -> list[_Shard]:
    """Hold out the rows of smallest hashes, and cut both splits into shards."""
    keys = [(number, row) for number, part in enumerate(seen.tokens) for row in range(part.size)]
    names = [_id(seen.checksums[number], row) for number, row in keys]
    held = round(spec.heldout_fraction * len(keys))
    if spec.heldout_fraction and len(keys) > 1:
        held = min(max(held, 1), len(keys) - 1)
    out = set(sorted(range(len(keys)), key=names.__getitem__)[:held])
    shards: list[_Shard] = []
    for split, chosen in (
        ("train", [k for k in range(len(keys)) if k not in out]), ("heldout", sorted(out)),
    ):  # fmt: skip
        for index, part in enumerate(_cut(chosen, keys, seen, spec.shard_tokens)):
            rows: dict[int, list[int]] = {}
            for place in part:
                rows.setdefault(keys[place][0], []).append(keys[place][1])
            planned = PlannedRows(
                split,
                index,
                len(part),
                sum(int(seen.tokens[keys[place][0]][keys[place][1]]) for place in part),
                fingerprint([names[place] for place in part]),
            )
            pieces = tuple((number, np.array(found)) for number, found in rows.items())
            shards.append(_Shard(planned, pieces))
    return shards


def _cut(
    chosen: Sequence[int], keys: Sequence[tuple[int, int]], seen: _Seen, most: int
) -> Iterator[list[int]]:
    part: list[int] = []
    total = 0
    for place in chosen:
        size = int(seen.tokens[keys[place][0]][keys[place][1]])
        if part and total + size > most:
            yield part
            part, total = [], 0
        part.append(place)
        total += size
    if part:
        yield part


def _rows(
    file: ForeignFile,
    columns: Mapping[str, pa.DataType],
    checksum: str,
    rows: NDArray[np.int64],
    spec: ImportSpec,
) -> Iterator[Imported]:
    place = 0
    for table in file.rows(columns, rows):
        for raw in raw_rows(spec.format, table, spec.compression):
            row = raw if isinstance(raw, str) else imported_row(
                raw, sample_id=_id(checksum, int(rows[place])), vocab_size=spec.vocab_size,
                lossy=FORMATS[spec.format].lossy,
            )  # fmt: skip
            if isinstance(row, str):
                raise CacheError(f"{file.url}: changed while it was imported ({row})")
            place += 1
            yield row


def _identity(seen: _Seen, spec: ImportSpec) -> dict[str, Any]:
    unknown = list(FORMATS[spec.format].unknown)
    if not seen.labels_outside:
        unknown.remove(LABELS_OUTSIDE)
    if seen.largest_gap < _NO_TAIL:
        unknown.append("the tail (the entries of every position sum to 1)")
    unknown.append("the likeliest token where log-probs of the file are equal (the lowest id then)")
    imported: dict[str, Any] = {"format": spec.format, "unknown": unknown}
    if seen.rescaled:
        imported["positions_rescaled"] = seen.rescaled
    return {
        "format_version": FORMAT_VERSION,
        "teacher": {
            "model": spec.teacher, "revision": "unknown", "dtype": "unknown",
            "engine": f"imported from {spec.format}", "engine_version": "(unknown)",
            "device": "unknown", "head_dtype": "unknown",
        },
        "tokenizer": {
            "vocabulary_sha256": spec.tokenizer.vocabulary_sha256, "size": spec.tokenizer.size,
        },
        "corpus": {
            "source": f"{len(seen.checksums)} files of {spec.format}",
            "files_xxh3_128": fingerprint(seen.checksums),
            "max_length": max(int(part.max(initial=0)) for part in seen.tokens),
            "heldout_fraction": spec.heldout_fraction,
        },
        "scheme": {"name": "top-k", "top_k": seen.most_entries, "temperatures": [1.0]},
        "codec": CodecSpec(spec.vocab_size, largest_known=True).to_json(),
        "shard_tokens": spec.shard_tokens,
        "imported": imported,
    }  # fmt: skip
