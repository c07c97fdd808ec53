"""From a dataset's name to its rows: embedded text, folder, file, URL or hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pipeline.config.nearest import beside, did_you_mean
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources.embedded import EMBEDDED_NAME, embedded_source
from pipeline.corpus.sources.files import files_source
from pipeline.corpus.sources.hub import hub_source, is_saved_dataset, saved_source
from pipeline.corpus.sources.readers import data_suffix
from pipeline.corpus.sources.rows import RowSource
from pipeline.errors import CorpusError

__all__ = ["open_source"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def open_source(settings: CorpusSettings, *, few: bool = False) -> RowSource:
    """Open the source named by `settings.dataset_name`; the embedded text and paths first.

    Args:
        settings: the corpus section of the configuration.
        few: only the first rows are wanted: a hub dataset is not downloaded for them.

    Raises:
        CorpusError: there is no such source, or it cannot be read.
    """
    name, split, config = settings.dataset_name, settings.dataset_split, settings.dataset_config
    if name == EMBEDDED_NAME:
        _refuse(settings, "dataset_config", "the embedded text")
        _refuse(settings, "dataset_revision", "the embedded text")
        return embedded_source(_embedded_kinds(settings))
    if "://" in name:
        _refuse(settings, "dataset_revision", "files")
        return files_source(name, split, config)
    path = Path(name).expanduser()
    if path.is_dir() and is_saved_dataset(path):
        _refuse(settings, "dataset_config", "a saved dataset")
        _refuse(settings, "dataset_revision", "a saved dataset")
        return saved_source(path, split)
    if path.exists():
        _refuse(settings, "dataset_revision", "files")
        return files_source(str(path.resolve()), split, config)
    if data_suffix(name) or not _HUB_NAME.fullmatch(name):
        raise CorpusError(
            f"{name}: no such file or folder",
            expected="'embedded', an existing file or folder, a URL, or a hub name like owner/name",
            do=did_you_mean(name, beside(name)) or "check --dataset_name",
        )
    return hub_source(settings, few=few)


def _refuse(settings: CorpusSettings, setting: str, what: str) -> None:
    value = getattr(settings, setting)
    if value is not None:
        raise CorpusError(
            f"{settings.dataset_name}: {setting} {value!r} is for datasets of the hub, and this "
            f"is {what}",
            do=f"leave out --corpus.{setting}, or give --dataset_name the dataset's hub name",
        )


def _embedded_kinds(settings: CorpusSettings) -> Literal["both", "chats", "documents"]:
    if settings.dataset_split != "train" or settings.column is not None:
        raise CorpusError(
            "the embedded text has one split, train, and no columns to choose from",
            do="leave --dataset_split and --corpus.column as they are, or name another dataset",
        )
    match settings.format:
        case "auto":
            return "both"
        case "messages":
            return "chats"
        case "text":
            return "documents"
    raise CorpusError(
        f"the embedded text has no rows of format {settings.format}",
        expected="auto (both kinds), messages (its chats) or text (its documents)",
    )
