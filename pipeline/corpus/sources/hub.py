"""Rows through the `datasets` library: hub datasets and folders of `save_to_disk`."""

from __future__ import annotations

import itertools
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources.arrow_values import arrow_rows
from pipeline.corpus.sources.rows import Piece, Row, even_pieces
from pipeline.errors import CorpusError

__all__ = ["StreamedSource", "TableSource", "hub_source", "is_saved_dataset", "saved_source"]


_MAPPED_BYTES = 32 << 20
_STREAMED_ROWS = 128


def hub_source(settings: CorpusSettings, *, few: bool = False) -> TableSource | StreamedSource:
    """Load one split of a hub dataset; a downloaded one needs no network.

    Args:
        settings: the corpus section of the configuration.
        few: only the first rows are wanted: they are fetched without the others. A part of a split
            (`train[:10%]`) is downloaded all the same, since only the whole tells where it ends.

    Raises:
        CorpusError: the library is missing, or the hub, the name, configuration or split fails.
    """
    datasets = _datasets_library(settings.dataset_name)
    try:
        builder = datasets.load_dataset_builder(
            settings.dataset_name, settings.dataset_config, revision=settings.dataset_revision
        )
        streamed = few and "[" not in settings.dataset_split and not _is_downloaded(builder)
        if streamed:
            table = builder.as_streaming_dataset(split=settings.dataset_split)
        else:
            builder.download_and_prepare()
            table = builder.as_dataset(split=settings.dataset_split)
    except Exception as error:  # the library raises a dozen kinds, its dependencies more
        raise _hub_error(settings, error) from error
    name = "/".join(
        ["hub", settings.dataset_name, builder.config.name or "default", settings.dataset_split]
    )
    identity = {
        "revision": settings.dataset_revision,
        # For data files on the hub this is the commit that was resolved.
        "resolved": str(builder.hash) if builder.hash else None,
        "config": builder.config.name,
    }
    kind = StreamedSource if streamed else TableSource
    return kind(name, table, settings.dataset_name, identity)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was written by `datasets.save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def saved_source(folder: Path, split: str) -> TableSource:
    """Load a folder of `save_to_disk`; `split` picks from a dictionary of datasets.

    A dataset that was saved alone has one split: its own, or `train` where it has no name.

    Raises:
        CorpusError: the library is missing, the folder is damaged or lacks the split.
    """
    datasets = _datasets_library(str(folder))
    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise CorpusError(
            f"{folder}: cannot be loaded ({_reason(error)})",
            expected="a folder written by datasets.save_to_disk",
        ) from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise CorpusError(
                f"{folder}: has no split {split!r}",
                expected=f"one of {', '.join(sorted(map(str, table)))}",
                do="set --dataset_split",
            )
        table = table[split]
    else:
        # A part of a split is named like train[:10%].
        found = re.match(r"\w+", str(table.split or ""))
        own = found[0] if found else "train"
        if split != own:
            raise CorpusError(
                f"{folder}: holds one dataset, of the split {own!r}, not {split!r}",
                do=f"set --dataset_split {own}",
            )
    name = f"saved/{folder.resolve().name}/{split}"
    return TableSource(name, table, folder.name, {"rows": len(table)})


@dataclass(frozen=True, slots=True)
class TableSource:
    """The rows of a `datasets.Dataset`; satisfies `RowSource`. Pickled, it is paths, not data."""

    name: str
    table: Any
    label: str
    """For messages."""
    identity: dict[str, Any]

    @property
    def total(self) -> int | None:
        """The rows."""
        return len(self.table)

    @property
    def mixed(self) -> bool:
        """No: all rows are of one format."""
        return False

    def pieces(self, size: int) -> Iterator[Piece]:
        """Divide the rows evenly."""
        return even_pieces(len(self.table), int(self.table.data.nbytes), size)

    def read(self, piece: Piece) -> Iterator[Row]:
        """Yield the rows of a piece."""
        # As Arrow, not as the library's Python values: those decode images, follow a saved format
        # (tensors) and do not say which nulls are padding.
        batches = (
            batch
            for part in _mapped(self.table, piece.start, piece.stop)
            for batch in part.with_format("arrow").iter(batch_size=1024)
        )
        for number, data in enumerate(arrow_rows(batches, self.label), start=piece.start):
            yield Row(key=str(number), place=f"{self.label}, row {number}", data=data)

    def count(self, piece: Piece, at_most: int) -> int:
        """Return the rows of a piece."""
        return min(piece.stop - piece.start, at_most)


@dataclass(frozen=True, slots=True)
class StreamedSource:
    """The first rows of a hub dataset, fetched as they are read; satisfies `RowSource`."""

    name: str
    table: Any
    """A `datasets.IterableDataset`."""
    label: str
    """For messages."""
    identity: dict[str, Any]

    @property
    def total(self) -> int | None:
        """Not known without reading."""
        return None

    @property
    def mixed(self) -> bool:
        """No: all rows are of one format."""
        return False

    def pieces(self, size: int) -> Iterator[Piece]:
        """Return all rows as one piece."""
        yield Piece(0, 0, -1, 0, None, size)

    def read(self, piece: Piece) -> Iterator[Row]:
        """Yield the rows from the first on.

        Raises:
            CorpusError: they cannot be fetched.
        """
        batches = self.table.with_format("arrow").iter(batch_size=_STREAMED_ROWS)
        rows = arrow_rows(batches, self.label)
        number = 0
        while True:
            try:
                data = next(rows, None)
            except CorpusError:
                raise
            except Exception as error:  # the library raises a dozen kinds, its dependencies more
                raise CorpusError(
                    f"{self.label}, row {number}: cannot be fetched ({_reason(error)})",
                    do="check the network, and run the command again",
                ) from error
            if data is None:
                return
            yield Row(key=str(number), place=f"{self.label}, row {number}", data=data)
            number += 1

    def count(self, piece: Piece, at_most: int) -> int:
        """Return the rows that there are, by reading them."""
        return sum(1 for _ in itertools.islice(self.read(piece), at_most))


def _is_downloaded(builder: Any) -> bool:
    return bool(builder.cache_dir) and Path(builder.cache_dir).exists()


def _datasets_library(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(
            f"{what}: needs the package datasets, which is not installed",
            do="pip install datasets, or use a folder of Parquet or JSON Lines files",
        ) from error
    return datasets


def _mapped(table: Any, first: int, stop: int) -> Iterator[Any]:
    """Slice a memory-mapped table, each slice from a separate mapping.

    Pages that were read count as the process's memory until their mapping is closed.
    """
    rows = len(table)
    if not rows:
        return
    if not table.cache_files:  # in memory
        yield table.select(range(first, stop))
        return
    step = max(1024, rows * _MAPPED_BYTES // max(int(table.data.nbytes), 1))
    recipe = pickle.dumps(table)  # of a mapped table: paths, not data
    for start in range(first, stop, step):
        yield pickle.loads(recipe).select(range(start, min(start + step, stop)))


def _hub_error(settings: CorpusSettings, error: Exception) -> CorpusError:
    what = settings.dataset_name
    for label, value in (
        ("configuration", settings.dataset_config),
        ("revision", settings.dataset_revision),
        ("split", settings.dataset_split),
    ):
        what += f", {label} {value}" if value else ""
    reason = _reason(error)
    lowered = f"{type(error).__name__} {reason}".lower()
    do = "check the name, or give --dataset_name a local folder or file"
    if "config name is missing" in lowered or "builderconfig" in lowered:
        do = "set --corpus.dataset_config"
    elif "unknown split" in lowered:
        do = "set --dataset_split"
    elif any(word in lowered for word in ("gated", "401", "403", "authenticat", "private")):
        do = "set HF_TOKEN to a token that may read it"
    elif any(word in lowered for word in ("reach", "connect", "offline", "timed out", "resolve")):
        do = (
            "check the network (and HF_HUB_OFFLINE), set HF_TOKEN if it is private, or give "
            "--dataset_name a local folder or file"
        )
    elif os.environ.get("HF_TOKEN") is None:
        do += "; a private or gated dataset needs HF_TOKEN"
    return CorpusError(
        f"the hub dataset {what} cannot be loaded ({reason})",
        expected="a dataset that the Hugging Face hub serves or the cache holds",
        do=do,
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    first = " ".join(line.strip() for line in lines[:2]).rstrip(".") if lines else "no reason given"
    return f"{type(error).__name__}: {first[:300]}"
