"""The kinds of data files, and the rows of each: Parquet, JSON Lines, JSON, CSV, text.

A row that is at fault alone comes as a `BadRow` in its place; what ends a file is an error.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import IO, Any

from pipeline.corpus.sources.arrow_values import arrow_rows
from pipeline.corpus.sources.json_items import NotAnArray, json_items
from pipeline.corpus.sources.packed import PACKED
from pipeline.corpus.sources.rows import BadRow
from pipeline.corpus.sources.unfit import JSON, described, is_unicode, kind_of_fault
from pipeline.errors import CorpusError

__all__ = [
    "DATA_SUFFIXES", "READABLE", "Open", "Placed", "count_lines", "data_suffix",
    "read_lines", "read_row_groups", "reader_of", "row_group_sizes",
]  # fmt: skip

Open = Callable[[], AbstractContextManager[IO[bytes]]]
"""Opens a file from its beginning; text kinds are unpacked already."""
Placed = Iterator[tuple[int, str, dict[str, Any] | BadRow]]
"""Rows with what names them within the file (their number from 0, or the byte at which a line of
JSON Lines begins: known without what is before it) and their places, for messages."""

_PARQUET_BUFFER = 1 << 20
"""Bytes of a column read at one time; without it the column of a row group is read at once."""
_UTF8 = "utf-8-sig"
_ONE_OBJECT = "one JSON object on each line"


def data_suffix(name: str) -> str | None:
    """Return the suffix that determines how a file is read, or None if it is not a data file."""
    base, last = posixpath.splitext(name.lower())
    if last not in PACKED:
        return last if last in _READERS else None
    suffix = posixpath.splitext(base)[1]
    return suffix if suffix in _READERS and suffix != ".parquet" else None


def reader_of(name: str) -> Callable[[Open, str], Placed]:
    """Return the reader of a data file; it raises `CorpusError` for what ends the file."""
    return _READERS[str(data_suffix(name))]


def read_row_groups(
    open_file: Open, name: str, start: int = 0, stop: int = -1, first_row: int = 0
) -> Placed:
    """Read a range of a Parquet file's row groups; `first_row` rows are before them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def batches(file: Any) -> Iterator[Any]:
        for group in range(start, file.num_row_groups if stop < 0 else stop):
            # Each of Arrow's threads keeps an arena: 171 MB at the peak of a file, 107 without
            # them.
            yield from file.iter_batches(1024, row_groups=[group], use_threads=False)

    with open_file() as stream:
        try:
            # pre_buffer, on by default in pyarrow, keeps every row group that was read.
            file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_PARQUET_BUFFER)
            for number, data in enumerate(arrow_rows(batches(file), name), start=first_row):
                yield number, f"{name}, row {number + 1}", data
        except pa.ArrowException as error:
            raise _not_parquet(name, error) from error


def row_group_sizes(open_file: Open, name: str) -> list[tuple[int, int]]:
    """Return the rows and the unpacked bytes of each row group of a Parquet file.

    Raises:
        CorpusError: it is not a readable Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_file() as stream:
        try:
            meta = pq.ParquetFile(stream, pre_buffer=False).metadata
        except pa.ArrowException as error:
            raise _not_parquet(name, error) from error
        groups = (meta.row_group(group) for group in range(meta.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]


def _not_parquet(name: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"{name}: is not a readable Parquet file ({error})", do="copy the file again"
    )


def read_lines(open_file: Open, name: str, start: int = 0, stop: int = -1) -> Placed:
    """Read the lines of JSON Lines that begin at the bytes from `start` on and before `stop`."""
    with open_file() as stream:
        for number, (at, raw) in enumerate(_lines(stream, start, stop), start=1):
            # What number the line has in the file only those before it could tell.
            place = f"{name}, line {number}" if not start else f"{name}, byte {at}"
            try:
                line = raw.decode("utf-8" if at else _UTF8).strip()
            except UnicodeDecodeError as error:
                yield at, place, _not_utf8(place, error)
                continue
            if line:
                yield at, place, _json_line(line, place)


def count_lines(open_file: Open, at_most: int, start: int = 0, stop: int = -1) -> int:
    """Return the lines that are rows in a range, or `at_most` where there are more."""
    count = 0
    with open_file() as stream:
        for at, raw in _lines(stream, start, stop):
            count += bool(raw.decode("utf-8" if at else _UTF8, errors="replace").strip())
            if count >= at_most:
                break
    return count


def _lines(stream: IO[bytes], start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that begin in a range of bytes, each with the byte where it does."""
    at = start
    if start:
        stream.seek(start - 1)
        at += len(stream.readline()) - 1  # the rest of a line that begins before the range
    while stop < 0 or at < stop:
        raw = stream.readline()
        if not raw:
            return
        yield at, raw
        at += len(raw)


def _json_line(line: str, place: str) -> dict[str, Any] | BadRow:
    try:
        data = JSON.decode(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number too long, an object too deep
        reason = str(error)
    else:
        return _as_object(data, place)
    return BadRow("not JSON", f"{place}: {reason}", expected=_ONE_OBJECT)


def _read_json(open_file: Open, name: str) -> Placed:
    with open_file() as stream:
        # A byte that is not UTF-8 becomes half of a surrogate pair, which fails one row.
        text = io.TextIOWrapper(stream, encoding=_UTF8, errors="surrogateescape")
        try:
            for number, item in enumerate(json_items(text)):
                place = f"{name}, item {number + 1}"
                yield number, place, _as_object(item, place)
            return
        except NotAnArray:
            pass
        except json.JSONDecodeError as error:
            raise _json_mistake(error, name) from None
    yield from _read_json_value(open_file, name)


def _read_json_value(open_file: Open, name: str) -> Placed:
    """Read one object, or one object around an array; at once, unlike all other files."""
    with open_file() as stream:
        head = next((line for line in stream if line.strip(b" \t\r\n\xef\xbb\xbf")), b"")
        try:
            data = JSON.decode(head.decode(_UTF8))
            more = any(line.strip() for line in stream)
        except json.JSONDecodeError:
            data, more = _whole_value(open_file, name), False
    if more:
        # Many JSON Lines files are named .json; they have a second value after the first.
        yield from read_lines(open_file, name)
        return
    arrays = [v for v in data.values() if isinstance(v, list)] if isinstance(data, dict) else []
    for number, item in enumerate(arrays[0] if arrays and len(data) == 1 else [data]):
        place = f"{name}, item {number + 1}"
        yield number, place, _as_object(item, place)


def _whole_value(open_file: Open, name: str) -> Any:
    with open_file() as stream:
        try:
            return JSON.decode(stream.read().decode(_UTF8))
        except json.JSONDecodeError as error:
            raise _json_mistake(error, name) from None


def _json_mistake(error: json.JSONDecodeError, name: str) -> CorpusError:
    return CorpusError(
        f"{name}, line {error.lineno}: {error.msg}", expected="a JSON array of objects"
    )


def _csv_reader(delimiter: str) -> Callable[[Open, str], Placed]:
    def read(open_file: Open, name: str) -> Placed:
        # The module's limit, 128 KiB, is shorter than many a conversation. C's long on Windows is
        # the largest it takes everywhere.
        csv.field_size_limit(min(sys.maxsize, (1 << 31) - 1))
        with open_file() as stream:
            text = io.TextIOWrapper(stream, encoding=_UTF8, errors="surrogateescape", newline="")
            reader = csv.DictReader(text, strict=True, delimiter=delimiter)
            try:
                header = _csv_header(reader, name)
                for number, data in enumerate(reader):
                    place = f"{name}, record {number + 1}"
                    yield number, place, _csv_record(data, header, place)
            except csv.Error as error:
                raise CorpusError(
                    f"{name}, line {reader.line_num}: {error}", expected="CSV"
                ) from None

    return read


def _csv_header(reader: csv.DictReader[str], name: str) -> list[str]:
    header = list(reader.fieldnames or ())
    twice = [column for column, count in Counter(header).items() if count > 1]
    if twice:
        raise CorpusError(
            f"{name}: the header has the column {twice[0]!r} twice",
            expected="columns with different names",
        )
    if not is_unicode("".join(header)):
        raise CorpusError(f"{name}: the header is not UTF-8 text", expected="UTF-8")
    return header


def _csv_record(data: dict[Any, Any], header: list[str], place: str) -> dict[str, Any] | BadRow:
    if None in data or None in data.values():
        return BadRow(
            "another number of fields",
            f"{place}: has another number of fields than the header",
            expected=f"the columns {', '.join(header)}",
        )
    if not is_unicode("".join(data.values())):
        return BadRow("not UTF-8", f"{place}: is not UTF-8 text", expected="UTF-8")
    return data


def _read_text(open_file: Open, name: str) -> Placed:
    with open_file() as stream:
        try:
            yield 0, name, {"text": stream.read().decode(_UTF8)}
        except UnicodeDecodeError as error:
            yield 0, name, _not_utf8(name, error)


def _not_utf8(place: str, error: UnicodeDecodeError) -> BadRow:
    return BadRow(
        "not UTF-8",
        f"{place}: is not UTF-8 text ({error.reason} at byte {error.start + 1})",
        expected="UTF-8",
    )


def _as_object(data: object, place: str) -> dict[str, Any] | BadRow:
    if isinstance(data, dict):
        return data
    return BadRow(
        kind_of_fault(data, "not an object"),
        f"{place}: holds {described(data)}",
        expected="a JSON object with named columns",
    )


_READERS: dict[str, Callable[[Open, str], Placed]] = {
    ".parquet": read_row_groups,
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".json": _read_json,
    ".csv": _csv_reader(","),
    ".tsv": _csv_reader("\t"),
    ".txt": _read_text,
}

DATA_SUFFIXES = tuple(_READERS)
"""In the order in which a folder is searched."""

READABLE = (
    f"{', '.join(DATA_SUFFIXES[:-1])} or {DATA_SUFFIXES[-1]}, "
    f"all but .parquet also as {', '.join(PACKED[:-1])} or {PACKED[-1]}"
)
"""For messages."""
