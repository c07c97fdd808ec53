"""Read configuration files: YAML or JSON to a mapping; mistakes are reported with their line."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import yaml

from pipeline.errors import ConfigError
from pipeline.program import packaged_file

__all__ = ["read_config_file"]


def read_config_file(path: str) -> dict[str, Any]:
    """Read one YAML (`.yaml`, `.yml`) or JSON (`.json`) file.

    Raises:
        ConfigError: the file is missing, unreadable, malformed, or holds no mapping.
    """
    file = packaged_file(path)
    if file.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(
            f"{path}: a configuration file with the ending {file.suffix or '(none)'}",
            expected=".yaml, .yml or .json",
        )
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror})",
            expected="a configuration file",
            do="the project's own are in stages/configs",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason})", expected="UTF-8") from None
    try:
        if file.suffix == ".json":
            data = json.loads(text, object_pairs_hook=partial(_unique, path))
        else:
            data = yaml.load(text, _UniqueKeyLoader)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}", expected="JSON") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "malformed"
        raise ConfigError(f"{path}{line}: {problem}", expected="YAML") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: holds {type(data).__name__}", expected="a mapping of settings at the top"
        )
    return data


def _unique(path: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ConfigError(f"{path}: the key {key!r} is given twice", expected="JSON")
        data[key] = value
    return data


class _UniqueKeyLoader(yaml.SafeLoader):
    """Rejects a key given twice, of which YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
