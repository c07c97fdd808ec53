"""The configurations that the README.md of a hub dataset declares, for a local copy of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pipeline.errors import CorpusError

__all__ = ["Configuration", "choose_configuration", "configurations"]

_FRONT_MATTER = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_CONFIGS = "`configs:` as the Hugging Face hub describes it: config_name and data_files"


@dataclass(frozen=True, slots=True)
class Configuration:
    """One configuration: which files each of its splits has."""

    name: str
    is_default: bool
    folder: str
    """Its `data_dir` with a slash at the end; empty for the whole dataset."""
    patterns: dict[str, list[str]]
    """Of file names by split, below the folder; empty where names decide about the split."""

    def names(self, file: str, split: str) -> bool:
        """Whether a file, relative to the dataset, is one of `split`."""
        inside = file.removeprefix(self.folder)
        return any(
            _matches(inside.split("/"), pattern.split("/"))
            and (not _is_hidden(inside) or _is_hidden(pattern))
            for pattern in self.patterns[split]
        )


def _matches(name: list[str], pattern: list[str]) -> bool:
    """Whether a path fits a pattern, part by part; `**` is any number of parts."""
    if not pattern or not name:
        return not pattern and not name
    if pattern[0] == "**":
        return (
            _matches(name[1:], pattern[1:])
            or _matches(name[1:], pattern)
            or (len(pattern) > 1 and _matches(name, pattern[1:]))
        )
    return fnmatchcase(name[0], pattern[0]) and _matches(name[1:], pattern[1:])


def _is_hidden(name: str) -> bool:
    return any(part[:1] in (".", "_") for part in name.split("/"))


def configurations(readme: str, place: str) -> list[Configuration]:
    """Return what the front matter of a README declares; empty where it declares nothing.

    Raises:
        CorpusError: the front matter is not YAML, or `configs` is no list of configurations.
    """
    import yaml

    found = _FRONT_MATTER.match(readme)
    try:
        card = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise CorpusError(
            f"{place}: the front matter is not YAML ({' '.join(str(error).split())})",
            expected=_CONFIGS,
        ) from None
    declared = card.get("configs") if isinstance(card, Mapping) else None
    if not declared:
        return []
    if not isinstance(declared, list):
        raise CorpusError(f"{place}: `configs` holds {type(declared).__name__}", expected=_CONFIGS)
    return [_configuration(item, place) for item in declared]


def choose_configuration(
    declared: list[Configuration], wanted: str | None, place: str
) -> Configuration | None:
    """Return the configuration to read: the one named, the default, or the only one.

    Returns:
        None where none is declared and none is named.

    Raises:
        CorpusError: the named one is not declared, or several are and none is the default.
    """
    names = ", ".join(one.name for one in declared)
    if wanted is not None:
        for one in declared:
            if one.name == wanted:
                return one
        raise CorpusError(
            f"{place}: the configuration {wanted!r} is requested, but "
            + ("it is not declared" if declared else "none is declared in a README.md there"),
            expected=f"one of {names}" if declared else "",
            do="set --corpus.dataset_config" if declared else "leave out --corpus.dataset_config",
        )
    if len(declared) <= 1:
        return declared[0] if declared else None
    for one in declared:
        if one.is_default:
            return one
    raise CorpusError(
        f"{place}: its README.md declares {len(declared)} configurations and none is named",
        expected=f"one of {names}",
        do="set --corpus.dataset_config",
    )


def _configuration(item: Any, place: str) -> Configuration:
    if not isinstance(item, Mapping):
        raise CorpusError(f"{place}: `configs` holds {item!r:.80}", expected=_CONFIGS)
    name = str(item.get("config_name", "default"))
    folder = str(item.get("data_dir") or "").strip("/").removeprefix("./")
    return Configuration(
        name=name,
        is_default=name == "default" or item.get("default") is True,
        folder=f"{folder}/" if folder not in ("", ".") else "",
        patterns=_patterns(item.get("data_files"), f"{place}, configuration {name}"),
    )


def _patterns(files: Any, place: str) -> dict[str, list[str]]:
    if files is None:
        return {}
    if isinstance(files, Mapping):
        return {str(split): _texts(path, place) for split, path in files.items()}
    if isinstance(files, list) and all(isinstance(item, Mapping) for item in files):
        by_split: dict[str, list[str]] = {}
        for item in files:
            split = str(item.get("split", "train"))
            by_split.setdefault(split, []).extend(_texts(item.get("path"), place))
        return by_split
    return {"train": _texts(files, place)}


def _texts(value: Any, place: str) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise CorpusError(f"{place}: data_files holds {value!r:.80}", expected=_CONFIGS)
    return [text.removeprefix("./") for text in texts]
