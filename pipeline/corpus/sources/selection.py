"""Which files of a folder are read, and why the others are not; both are logged."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.corpus.sources.dataset_card import Configuration
from pipeline.corpus.sources.readers import DATA_SUFFIXES, READABLE, data_suffix
from pipeline.errors import CorpusError

__all__ = ["DataFile", "of_configuration", "of_folder", "require_split_of_file"]

_log = logging.getLogger(__name__)

_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "eval", "heldout")
_DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""What the `datasets` library writes about data; no rows."""
_LISTED = 5


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of a source."""

    path: str
    name: str
    """Relative to the folder that was named."""
    size: int


def of_folder(files: list[DataFile], split: str, location: str) -> list[DataFile]:
    """Choose the data files of a folder: of one kind, and of `split` where names contain splits.

    Raises:
        CorpusError: no file of a known kind, or no such split.
    """
    left: dict[str, list[DataFile]] = {}
    chosen = _of_one_kind(_visible(files, left), location, files, left)
    chosen = _of_split(chosen, split, location, left)
    _report(location, chosen, left)
    return chosen


def of_configuration(
    files: list[DataFile], configuration: Configuration, split: str, location: str
) -> list[DataFile]:
    """Choose the files that a configuration of the dataset card names for `split`.

    Raises:
        CorpusError: the configuration has no such split, or names no file of a known kind.
    """
    base = configuration.folder
    inside = [file for file in files if file.name.startswith(base)]
    left: dict[str, list[DataFile]] = {}
    if not configuration.patterns:
        outside = [file for file in _visible(files, {}) if not file.name.startswith(base)]
        _leave(left, f"outside {base}", filter(_is_data, outside))
        chosen = _of_one_kind(_visible(inside, left), location, inside, left)
        chosen = _of_split(chosen, split, location, left)
    else:
        if split not in configuration.patterns:
            raise CorpusError(
                f"{location}: the configuration {configuration.name} has no split {split!r}",
                expected=f"one of {', '.join(configuration.patterns)}",
                do="set --dataset_split",
            )
        named = [file for file in inside if configuration.names(file.name, split)]
        names = {file.name for file in named}
        others = [file for file in _visible(files, {}) if file.name not in names]
        reason = f"not of the split {split} of the configuration {configuration.name}"
        _leave(left, reason, filter(_is_data, others))
        chosen = _of_one_kind(named, location, named, left)
    _report(f"{location}, configuration {configuration.name}", chosen, left)
    return chosen


def _visible(files: list[DataFile], left: dict[str, list[DataFile]]) -> list[DataFile]:
    hidden = [file for file in files if any(part[0] in "._" for part in file.name.split("/"))]
    _leave(left, "hidden: a name begins with a dot or an underscore", filter(_is_data, hidden))
    names = {file.name for file in hidden}
    return [file for file in files if file.name not in names]


def _is_data(file: DataFile) -> bool:
    base = file.name.rsplit("/", maxsplit=1)[-1]
    return data_suffix(base) is not None and base not in _DESCRIPTIONS


def _of_one_kind(
    files: list[DataFile],
    location: str,
    found: list[DataFile],
    left: dict[str, list[DataFile]],
) -> list[DataFile]:
    data = [file for file in files if _is_data(file)]
    kinds = {data_suffix(file.name) for file in data}
    for suffix in DATA_SUFFIXES:
        if suffix in kinds:
            others = [file for file in data if data_suffix(file.name) != suffix]
            _leave(left, f"another kind than {suffix}", others)
            if rest := [file.name for file in files if not _is_data(file)]:
                _log.info("%s: not data: %s", location, _shortened(rest))
            return [file for file in data if data_suffix(file.name) == suffix]
    names = _shortened([file.name for file in found]) or "no files"
    raise CorpusError(
        f"{location}: holds no data that can be read (found {names})", expected=READABLE
    )


def _of_split(
    files: list[DataFile], split: str, location: str, left: dict[str, list[DataFile]]
) -> list[DataFile]:
    named = {file.name: _split_of(file.name) for file in files}
    known = sorted({name for name in named.values() if name})
    if not known:
        if split != "train":
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
    _leave(left, "another split", (f for f in files if named[f.name] not in (split, None)))
    _leave(
        left,
        "no split in the name, while other files have one",
        (f for f in files if named[f.name] is None),
    )
    return chosen


def require_split_of_file(name: str, split: str, location: str) -> None:
    """Refuse a split that a single file cannot be: any but `train` and the one in its name.

    Raises:
        CorpusError: as said.
    """
    if split not in ("train", _split_of(name)):
        raise CorpusError(
            f"{location}: the split {split!r} is requested, but file names contain no splits",
            do="leave --dataset_split at train, or name the file itself in --dataset_name",
        )


def _split_of(name: str) -> str | None:
    for part in reversed(name.lower().split("/")):
        word = re.split(r"[-_.]", part, maxsplit=1)[0]
        if word in _SPLITS:
            return word
    return None


def _leave(left: dict[str, list[DataFile]], reason: str, files: Iterable[DataFile]) -> None:
    if named := list(files):
        left[reason] = named


def _report(location: str, chosen: list[DataFile], left: dict[str, list[DataFile]]) -> None:
    names = _shortened([file.name for file in chosen])
    _log.info("%s: reading %d files: %s", location, len(chosen), names)
    if left:
        reasons = "; ".join(
            f"{_shortened([file.name for file in files])} ({reason})"
            for reason, files in left.items()
        )
        count = sum(map(len, left.values()))
        _log.warning("%s: leaving out %d data files: %s", location, count, reasons)


def _shortened(names: list[str]) -> str:
    more = len(names) - _LISTED
    text = ", ".join(names[:_LISTED])
    return f"{text} and {more} more" if more > 0 else text
