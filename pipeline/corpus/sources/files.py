"""Rows from files and folders, local or behind a URL: Parquet, JSON Lines, JSON, CSV, text."""

from __future__ import annotations

import itertools
import logging
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import IO, Any

from pipeline.corpus.sources.dataset_card import choose_configuration, configurations
from pipeline.corpus.sources.packed import DAMAGED, PACKED, unpacked
from pipeline.corpus.sources.readers import (
    READABLE,
    Placed,
    count_lines,
    data_suffix,
    read_lines,
    read_row_groups,
    reader_of,
    row_group_sizes,
)
from pipeline.corpus.sources.rows import BadRow, Piece, Row
from pipeline.corpus.sources.selection import (
    DataFile,
    of_configuration,
    of_folder,
    require_split_of_file,
)
from pipeline.errors import CorpusError

__all__ = ["FilesSource", "files_source"]

_log = logging.getLogger(__name__)

_CARD = "README.md"
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""A pointer of Git LFS is shorter."""


def files_source(location: str, split: str, config: str | None = None) -> FilesSource:
    """Read one file, or all data files of a folder in the order of their names.

    Of a folder with several kinds of data files, those of the first kind of `DATA_SUFFIXES` are
    read. Where names contain splits (`train-0.parquet`, `test/a.jsonl`), those of `split` are
    read. Names that begin with a dot or an underscore are ignored. In the copy of a hub dataset
    whose README.md declares configurations, those decide instead. The log names what is read and
    what is left out.

    Raises:
        CorpusError: no such path, no file of a known kind, no such split or configuration, or a
            malformed file.
    """
    fs, root = _open_location(location)
    try:
        single = fs.isfile(root)
        found = {root: fs.info(root)} if single else fs.find(root, detail=True)
    except Exception as error:
        raise _unreadable(location, error) from error
    base = posixpath.dirname(root) if single else root
    files = [
        DataFile(path, _unicode(posixpath.relpath(path, base)), int(info.get("size") or 0))
        for path, info in sorted(found.items())
    ]
    name = posixpath.basename(root.rstrip("/"))
    if single:
        chosen = [_single(files[0], split, config, location)]
    else:
        declared = configurations(_card(fs, files), f"{location}/{_CARD}")
        configuration = choose_configuration(declared, config, location)
        if configuration is None:
            chosen = of_folder(files, split, location)
        else:
            chosen = of_configuration(files, configuration, split, location)
            name += f"/{configuration.name}"
    return FilesSource(f"files/{name}", fs, tuple(chosen))


@dataclass(frozen=True, slots=True)
class FilesSource:
    """The rows of some files, one file after the other; satisfies `RowSource`."""

    name: str
    fs: Any
    files: tuple[DataFile, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """The names and sizes of the files."""
        return {"files": [[file.name, file.size] for file in self.files]}

    @property
    def total(self) -> int | None:
        """Not known without reading."""
        return None

    @property
    def mixed(self) -> bool:
        """No: all rows are of one format."""
        return False

    def pieces(self, size: int) -> Iterator[Piece]:
        """Divide Parquet at row groups and JSON Lines anywhere; other files are one piece each."""
        for number, file in enumerate(self.files):
            match data_suffix(file.name):
                case ".parquet":
                    yield from self._row_groups(number, file, size)
                case ".jsonl" | ".ndjson" if not _is_packed(file) and file.size > size:
                    parts = file.size // size
                    cuts = [file.size * part // parts for part in range(parts)]
                    for start, stop in pairwise([*cuts, -1]):
                        length = (file.size if stop < 0 else stop) - start
                        yield Piece(number, start, stop, 0, None, length)
                case _:
                    if file.size > size:
                        _log.info("%s: cannot be divided; one process reads it", file.name)
                    yield Piece(number, 0, -1, 0, None, file.size)

    def read(self, piece: Piece) -> Iterator[Row]:
        """Yield the rows of a piece."""
        file = self.files[piece.file]
        with _named(file):
            for number, place, data in self._placed(file, piece):
                bad = data if isinstance(data, BadRow) else None
                values = {} if isinstance(data, BadRow) else data
                yield Row(f"{file.name}:{number}", place, values, bad)

    def count(self, piece: Piece, at_most: int) -> int:
        """Count the rows of a piece; lines are not parsed."""
        if piece.rows is not None:
            return min(piece.rows, at_most)
        file = self.files[piece.file]
        if data_suffix(file.name) in (".jsonl", ".ndjson"):
            with _named(file):
                return count_lines(partial(self._open, file), at_most, piece.start, piece.stop)
        return sum(1 for _ in itertools.islice(self.read(piece), at_most))

    def _placed(self, file: DataFile, piece: Piece) -> Placed:
        """Read a piece by what its file is; only Parquet and JSON Lines have parts."""
        open_file = partial(self._open, file)
        match data_suffix(file.name):
            case _ if (piece.start, piece.stop) == (0, -1):
                return reader_of(file.name)(open_file, file.name)
            case ".parquet":
                return read_row_groups(
                    open_file, file.name, piece.start, piece.stop, piece.first_row
                )
            case _:
                return read_lines(open_file, file.name, piece.start, piece.stop)

    def _row_groups(self, number: int, file: DataFile, size: int) -> Iterator[Piece]:
        with _named(file):
            groups = row_group_sizes(partial(self._open, file), file.name)
        start = rows = held = before = 0
        for group, (group_rows, group_bytes) in enumerate(groups, start=1):
            rows, held = rows + group_rows, held + group_bytes
            if held >= size or group == len(groups):
                stop = -1 if group == len(groups) else group
                yield Piece(number, start, stop, before, rows, held)
                start, before, rows, held = group, before + rows, 0, 0

    @contextmanager
    def _open(self, file: DataFile) -> Iterator[IO[bytes]]:
        with self.fs.open(file.path, "rb") as stream:
            _require_content(stream, file)
            yield unpacked(stream, file.name)


def _open_location(location: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(location)
    except Exception as error:  # a missing driver, an unknown scheme, no credentials
        raise _unreadable(location, error) from error
    return fs, str(root).replace("\\", "/")


def _unicode(name: str) -> str:
    # It becomes a part of keys and sample ids.
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CorpusError(
            f"the name of the file {name!r} is not Unicode", do="rename the file"
        ) from None
    return name


def _single(file: DataFile, split: str, config: str | None, location: str) -> DataFile:
    if config is not None:
        raise CorpusError(
            f"{location}: the configuration {config!r} is requested of a single file",
            do="leave out --corpus.dataset_config",
        )
    if data_suffix(file.name) is None:
        raise CorpusError(
            f"{location}: holds no data that can be read (found {file.name})", expected=READABLE
        )
    require_split_of_file(file.name, split, location)
    _log.info("%s: reading 1 file", location)
    return file


def _card(fs: Any, files: list[DataFile]) -> str:
    for file in files:
        if file.name == _CARD:
            try:
                return bytes(fs.cat_file(file.path)).decode("utf-8", errors="replace")
            except Exception as error:
                raise _unreadable(file.path, error) from error
    return ""


def _is_packed(file: DataFile) -> bool:
    return file.name.lower().endswith(PACKED)


@contextmanager
def _named(file: DataFile) -> Iterator[None]:
    """Say of which file an error is that ends its reading."""
    try:
        yield
    except CorpusError:
        raise
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{file.name}: is not UTF-8 text ({error.reason} at byte {error.start})",
            expected="UTF-8",
        ) from error
    except DAMAGED as error:
        if not _is_packed(file):
            raise _unreadable(file.name, error) from error
        raise CorpusError(
            f"{file.name}: cannot be unpacked to its end ({_reason(error)})",
            do="copy the file again: it is cut off or damaged",
        ) from error
    except Exception as error:
        raise _unreadable(file.name, error) from error


def _require_content(stream: IO[bytes], file: DataFile) -> None:
    if 0 < file.size < _POINTER_BYTES:
        start = stream.read(len(_POINTER))
        stream.seek(0)
        if start == _POINTER:
            raise CorpusError(
                f"{file.name}: is a pointer of Git LFS, not the data",
                do="run `git lfs pull` in the copy of the dataset",
            )


def _unreadable(what: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"{what}: cannot be read ({_reason(error)})",
        do="check the path, the permissions and, for a URL, its driver and credentials",
    )


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no reason given'}"
