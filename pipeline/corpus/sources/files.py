"""Rows from files and folders, local or behind a URL: Parquet, JSON Lines, JSON, CSV, text."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from pipeline.corpus.sources.dataset_card import choose_configuration, configurations
from pipeline.corpus.sources.packed import DAMAGED, PACKED, unpacked
from pipeline.corpus.sources.readers import READABLE, data_suffix, reader_of
from pipeline.corpus.sources.rows import BadRow, Row, RowSource
from pipeline.corpus.sources.selection import (
    DataFile,
    of_configuration,
    of_folder,
    require_split_of_file,
)
from pipeline.errors import CorpusError

__all__ = ["files_source"]

_log = logging.getLogger(__name__)

_CARD = "README.md"
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""A pointer of Git LFS is shorter."""


def files_source(location: str, split: str, config: str | None = None) -> RowSource:
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


def _rows(fs: Any, files: list[DataFile]) -> Iterator[Row]:
    for file in files:

        @contextmanager
        def open_file(file: DataFile = file) -> Iterator[IO[bytes]]:
            with fs.open(file.path, "rb") as stream:
                _require_content(stream, file)
                yield unpacked(stream, file.name)

        try:
            for number, (place, data) in enumerate(reader_of(file.name)(open_file, file.name)):
                bad = data if isinstance(data, BadRow) else None
                values = {} if isinstance(data, BadRow) else data
                yield Row(f"{file.name}:{number}", place, values, bad)
        except CorpusError:
            raise
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{file.name}: is not UTF-8 text ({error.reason} at byte {error.start})",
                expected="UTF-8",
            ) from error
        except DAMAGED as error:
            if not file.name.lower().endswith(PACKED):
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
