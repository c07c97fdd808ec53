"""Rows from files and folders, local or behind a URL: Parquet, JSON Lines, JSON, CSV, text."""

from __future__ import annotations

import csv
import io
import json
import logging
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from pipeline.corpus.sources.json_items import NotAnArray, json_items
from pipeline.corpus.sources.rows import Row, RowSource
from pipeline.errors import CorpusError

__all__ = ["DATA_SUFFIXES", "data_suffix", "files_source"]

_log = logging.getLogger(__name__)

_PARQUET_BUFFER = 1 << 20
"""Bytes of a column read at one time; without it the column of a row group is read at once."""
_PACKED = (".gz", ".bz2", ".xz")
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "eval", "heldout")
_EXPECTED = ".parquet, .jsonl, .json, .csv or .txt"


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    name: str
    """Relative to the folder that was named."""
    size: int


def data_suffix(name: str) -> str | None:
    """Return the suffix that determines how a file is read, or None if it is not a data file."""
    base = name.lower()
    for packed in _PACKED:
        base = base.removesuffix(packed)
    suffix = posixpath.splitext(base)[1]
    if suffix not in _READERS or (suffix == ".parquet" and base != name.lower()):
        return None
    return suffix


def files_source(location: str, split: str) -> RowSource:
    """Read one file, or all data files of a folder in the order of their names.

    Of a folder with several kinds of data files, those of the first kind of `DATA_SUFFIXES` are
    read. Where names contain splits (`train-0.parquet`, `test/a.jsonl`), those of `split` are
    read. Names that begin with a dot or an underscore are ignored.

    Raises:
        CorpusError: no such path, no file of a known kind, no such split, or a malformed file.
    """
    fs, root = _open_location(location)
    try:
        single = fs.isfile(root)
        found = {root: fs.info(root)} if single else fs.find(root, detail=True)
    except Exception as error:
        raise _unreadable(location, error) from error
    base = posixpath.dirname(root) if single else root
    files = [
        _File(path, posixpath.relpath(path, base), int(info.get("size") or 0))
        for path, info in sorted(found.items())
    ]
    chosen = _of_split(_of_one_kind(files, location, single), split, location, single)
    name = posixpath.basename(root.rstrip("/"))
    return RowSource(
        name=f"files/{name}",
        rows=_rows(fs, chosen),
        total=None,
        identity={"files": [[file.name, file.size] for file in chosen]},
    )


def _open_location(location: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(location)
    except Exception as error:  # a missing driver, an unknown scheme, no credentials
        raise _unreadable(location, error) from error
    return fs, str(root).replace("\\", "/")


def _of_one_kind(files: list[_File], location: str, single: bool) -> list[_File]:
    by_kind: dict[str, list[_File]] = {}
    for file in files:
        hidden = any(part[0] in "._" for part in file.name.split("/"))
        suffix = data_suffix(file.name)
        if suffix and (single or not hidden):
            by_kind.setdefault(suffix, []).append(file)
    for suffix in DATA_SUFFIXES:
        if suffix in by_kind:
            others = sum(len(group) for kind, group in by_kind.items() if kind != suffix)
            if others:
                _log.warning(
                    "%s: reading the %d %s files and ignoring %d data files of other kinds",
                    location, len(by_kind[suffix]), suffix, others,
                )  # fmt: skip
            return by_kind[suffix]
    names = ", ".join(file.name for file in files[:5]) or "no files"
    raise CorpusError(
        f"{location}: holds no data that can be read (found {names})", expected=_EXPECTED
    )


def _of_split(files: list[_File], split: str, location: str, single: bool) -> list[_File]:
    named = {file.name: _split_of(file.name) for file in files}
    known = sorted({name for name in named.values() if name})
    if single or not known:
        if split != "train" and named[files[0].name] != split:
            raise CorpusError(
                f"{location}: the split {split!r} is requested, but file names contain no splits",
                do="leave --dataset_split at train, or name the file itself in --dataset_name",
            )
        return files
    chosen = [file for file in files if named[file.name] == split]
    if not chosen:
        raise CorpusError(
            f"{location}: has no split {split!r}",
            expected=f"one of {', '.join(known)}",
            do="set --dataset_split",
        )
    return chosen


def _split_of(name: str) -> str | None:
    for part in reversed(name.lower().split("/")):
        word = re.split(r"[-_.]", part, maxsplit=1)[0]
        if word in _SPLITS:
            return word
    return None


def _rows(fs: Any, files: list[_File]) -> Iterator[Row]:
    for file in files:
        suffix = data_suffix(file.name)
        reader = _READERS[str(suffix)]
        packed = None if suffix == ".parquet" else "infer"
        try:
            with fs.open(file.path, "rb", compression=packed) as stream:
                for number, (place, data) in enumerate(reader(stream, file.name)):
                    yield Row(key=f"{file.name}:{number}", place=place, data=data)
        except CorpusError:
            raise
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{file.name}: is not UTF-8 text ({error.reason} at byte {error.start})",
                expected="UTF-8",
            ) from error
        except Exception as error:
            raise _unreadable(file.name, error) from error


_Placed = Iterator[tuple[str, dict[str, Any]]]


def _read_parquet(stream: IO[bytes], name: str) -> _Placed:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        # pre_buffer, on by default in pyarrow, keeps every row group that was read.
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_PARQUET_BUFFER)
        for group in range(file.num_row_groups):
            # Each of Arrow's threads keeps an arena: 171 MB at the peak of a file, 107 without
            # them.
            for batch in file.iter_batches(1024, row_groups=[group], use_threads=False):
                for data in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", data
    except pa.ArrowException as error:
        raise CorpusError(
            f"{name}: is not a readable Parquet file ({error})", do="copy the file again"
        ) from error


def _read_json_lines(stream: IO[bytes], name: str) -> _Placed:
    for number, raw in enumerate(stream, start=1):
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if not line:
            continue
        place = f"{name}, line {number}"
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(
                f"{place}: {error.msg} at column {error.colno}",
                expected="one JSON object on each line",
            ) from None
        yield place, _as_object(data, place)


def _read_json(stream: IO[bytes], name: str) -> _Placed:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")
    try:
        items = json_items(text)
        for number, item in enumerate(items, start=1):
            place = f"{name}, item {number}"
            yield place, _as_object(item, place)
        return
    except NotAnArray:
        text.detach()
        stream.seek(0)
    except json.JSONDecodeError as error:
        raise _json_mistake(error, name) from None
    yield from _read_json_value(stream, name)


def _read_json_value(stream: IO[bytes], name: str) -> _Placed:
    """Read one object, or one object around an array; at once, unlike all other files."""
    head = next((line for line in stream if line.strip(b" \t\r\n\xef\xbb\xbf")), b"")
    try:
        data = json.loads(head.decode("utf-8-sig"))
        more = any(line.strip() for line in stream)
    except json.JSONDecodeError:
        stream.seek(0)
        try:
            data, more = json.loads(stream.read().decode("utf-8-sig")), False
        except json.JSONDecodeError as error:
            raise _json_mistake(error, name) from None
    if more:
        # Many JSON Lines files are named .json; they have a second value after the first.
        stream.seek(0)
        yield from _read_json_lines(stream, name)
        return
    arrays = [v for v in data.values() if isinstance(v, list)] if isinstance(data, dict) else []
    for number, item in enumerate(arrays[0] if arrays and len(data) == 1 else [data], start=1):
        place = f"{name}, item {number}"
        yield place, _as_object(item, place)


def _json_mistake(error: json.JSONDecodeError, name: str) -> CorpusError:
    return CorpusError(
        f"{name}, line {error.lineno}: {error.msg}", expected="a JSON array of objects"
    )


def _read_csv(stream: IO[bytes], name: str) -> _Placed:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, strict=True)
    try:
        for number, data in enumerate(reader, start=1):
            place = f"{name}, record {number}"
            if None in data or None in data.values():
                raise CorpusError(
                    f"{place}: has another number of fields than the header",
                    expected=f"the columns {', '.join(reader.fieldnames or ())}",
                )
            yield place, data
    except csv.Error as error:
        raise CorpusError(f"{name}, line {reader.line_num}: {error}", expected="CSV") from None


def _read_text(stream: IO[bytes], name: str) -> _Placed:
    yield name, {"text": stream.read().decode("utf-8-sig")}


def _as_object(data: object, place: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise CorpusError(
            f"{place}: holds {type(data).__name__}", expected="a JSON object with named columns"
        )
    return data


def _unreadable(what: str, error: Exception) -> CorpusError:
    text = str(error).strip().splitlines()
    reason = text[0] if text else "no reason given"
    return CorpusError(
        f"{what}: cannot be read ({type(error).__name__}: {reason})",
        do="check the path, the permissions and, for a URL, its driver and credentials",
    )


_READERS: dict[str, Callable[[IO[bytes], str], _Placed]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
}

DATA_SUFFIXES = tuple(_READERS)
"""In the order in which a folder is searched."""
