"""Command lines: files below flags, one message with every mistake, complete `--help`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from pipeline.config.fields import Leaf, leaves, names_of, suggestion, usual_name
from pipeline.config.files import read_config_file
from pipeline.config.helptext import help_text
from pipeline.config.mistakes import describe_errors
from pipeline.config.schema import Settings
from pipeline.errors import ConfigError

__all__ = ["Command", "DefaultFile", "parse_command"]

SettingsT = TypeVar("SettingsT", bound=Settings)

_FILE_FLAGS = ("config", "config_file")


@dataclass(frozen=True, slots=True)
class DefaultFile:
    """A file that is read below all others, where a run names nothing of its own."""

    path: str
    unless: tuple[str, ...]
    """Dotted names of fields; one that a file or a flag sets keeps the file out."""
    fits: Callable[[Mapping[str, Any]], bool] = lambda _: True
    """Whether it goes with what files and flags say; asked last."""


@dataclass(frozen=True, slots=True)
class Command(Generic[SettingsT]):
    """A parsed command line."""

    settings: SettingsT
    switches: frozenset[str]
    """The switches that were given, such as `dry_run`."""
    given: frozenset[str]
    """Dotted names of the fields that a file or a flag set."""
    default_file: str | None = None
    """The default file, where it was read."""


def parse_command(
    model: type[SettingsT],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    switches: Mapping[str, str] | None = None,
    examples: Sequence[str] = (),
    elsewhere: Mapping[str, type[Settings]] | None = None,
    default: DefaultFile | None = None,
) -> Command[SettingsT]:
    """Read files and flags into a validated `model`; print help and exit on `--help`.

    Precedence: defaults < `default`, where it applies < `--config` files in the order given <
    flags. A field is named by its
    dotted path (`--teacher.model`), its short name (`--teacher_model`), or its last part where no
    other field has that (`--keep_layers`); `-` and `_` are
    equivalent in a flag. `--name value`, `--name=value`, `--bool`, `--no-bool`; a list is `--list 1
    2`, `--list 1,2` or `--list "[1, 2]"`. A flag of another command (`elsewhere`, by the command's
    name) is rejected with the command it belongs to.

    Raises:
        ConfigError: with all mistakes of files and flags.
    """
    switches = dict(switches or {})
    all_leaves = list(leaves(model))
    if any(token in ("-h", "--help") for token in argv):
        print(help_text(all_leaves, prog, description, switches, examples))
        raise SystemExit(0)
    by_name = names_of(all_leaves)
    mistakes: list[str] = []
    others = {
        name: place
        for place, other in (elsewhere or {}).items()
        for full in names_of(list(leaves(other)))
        for name in (full, full.rsplit(".", 1)[-1], full.split(".", 1)[0])
    }
    files, values, active = _read_flags(argv, by_name, switches, others, mistakes)
    data: dict[str, Any] = {}
    unread = False
    for path in files:
        try:
            content = read_config_file(path)
        except ConfigError as error:
            mistakes.append(str(error).rstrip("."))
            unread = True
        else:
            _merge(data, _lift_shortnames_of(content, by_name, path, mistakes))
    for leaf, value in values:
        _set(data, leaf.path, value, mistakes)
    given = frozenset(leaf.dotted for leaf in all_leaves if _has(data, leaf.path))
    applies = default is not None and not given & {*default.unless} and default.fits(data)
    if default is not None and applies:
        below = _lift_shortnames_of(read_config_file(default.path), by_name, default.path, mistakes)
        _merge(below, data)
        data = below
    if unread:  # fields that such a file would have set are not reported as missing
        raise ConfigError(mistakes=mistakes)
    try:
        settings = model.model_validate(data)
    except ValidationError as error:
        mistakes.extend(describe_errors(error, all_leaves, others))
        settings = None
    if mistakes or settings is None:
        raise ConfigError(mistakes=mistakes)
    return Command(
        settings=settings,
        switches=frozenset(active),
        given=given,
        default_file=default.path if default is not None and applies else None,
    )


def _read_flags(
    argv: Sequence[str],
    by_name: dict[str, Leaf],
    switches: Mapping[str, str],
    others: Mapping[str, str],
    mistakes: list[str],
) -> tuple[list[str], list[tuple[Leaf, Any]], set[str]]:
    files: list[str] = []
    values: list[tuple[Leaf, Any]] = []
    active: set[str] = set()
    known = [*by_name, *switches, "config"]
    queue = list(argv)
    while queue:
        token = queue.pop(0)
        if not token.startswith("--") or token == "--":
            hint = _without_dashes(token, known)
            mistakes.append(f"{token!r}: expected a flag that starts with --{hint}")
            if hint and token.startswith("-") and queue and not queue[0].startswith("--"):
                queue.pop(0)  # its value is not reported as well
            continue
        raw, has_value, value = token[2:].partition("=")
        name = raw.replace("-", "_")
        if not has_value and name in switches:
            active.add(name)
            continue
        leaf = by_name.get(name)
        if leaf is None and name.startswith("no_") and name[3:] in by_name and not has_value:
            negated = by_name[name[3:]]
            if negated.is_bool:
                values.append((negated, False))
                continue
        if leaf is None and name not in _FILE_FLAGS:
            answer = _did_you_mean(name, known)
            # A name of the other stage, or of other trainers for one of its.
            place = others.get(name) or (not answer and others.get(usual_name(name)))
            if place:
                answer = f" here; it belongs to {place}"
            mistakes.append(f"--{raw}: unknown flag{answer}")
            if not has_value and queue and not queue[0].startswith("--"):
                queue.pop(0)  # the value of the unknown flag is not reported as well
            continue
        alone = not queue or (queue[0].startswith("--") and queue[0] != "--")
        if leaf is not None and leaf.is_bool and not has_value:
            follows = queue[0].lower() if queue else ""
            value = queue.pop(0) if follows in _TRUE | _FALSE | _NONE else "true"
        elif not has_value:
            if alone:
                mistakes.append(f"--{raw}: expected a value after it")
                continue
            value = queue.pop(0)
        if leaf is None:
            files.append(value)
            continue
        words = [value]
        while leaf.is_list and not has_value and queue and not queue[0].startswith("--"):
            words.append(queue.pop(0))
        values.append((leaf, _read_words(leaf, words)))
    return files, values, active


_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}
_NONE = {"none", "null"}


def _read_words(leaf: Leaf, words: list[str]) -> Any:
    """Return a flag's value; a list may be several words: `1 2` as `1,2` and `[1, 2]`."""
    values = [_read_value(leaf, word) for word in words]
    if len(values) == 1:
        return values[0]
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def _read_value(leaf: Leaf, text: str) -> Any:
    if text.lower() in _NONE and leaf.takes_none:
        return None
    if leaf.takes_text:
        return text
    import yaml

    def read(part: str) -> Any:
        try:
            return yaml.safe_load(part)
        except yaml.YAMLError:
            return part

    value = read(text)
    if leaf.is_list and not isinstance(value, list):
        return [read(part) for part in text.split(",")]
    return text if isinstance(value, str) else value


def _lift_shortnames_of(
    data: dict[str, Any], by_name: dict[str, Leaf], path: str, mistakes: list[str]
) -> dict[str, Any]:
    """Move top-level short names and dotted keys of a file to their sections."""
    lifted: dict[str, Any] = {}
    for key, value in data.items():
        leaf = by_name.get(str(key).replace("-", "_"))
        if leaf is not None and (len(leaf.path) > 1 or leaf.path[0] != key):
            _set(lifted, leaf.path, value, mistakes)
        elif isinstance(value, dict) and isinstance(lifted.get(key), dict):
            _merge(lifted[key], value)
        else:
            lifted[key] = value
    if "config_file" in lifted:
        mistakes.append(f"config_file: a file cannot name another file (in {path})")
        del lifted["config_file"]
    return lifted


def _without_dashes(token: str, known: list[str]) -> str:
    """Return what a bare word probably means: a file of settings, or a flag."""
    if token.lower().endswith((".yaml", ".yml", ".json")):
        return f"; a file of settings is given as --config {token}"
    name = token.lstrip("-").partition("=")[0].replace("-", "_")
    return _did_you_mean(name, known)


def _did_you_mean(name: str, known: list[str]) -> str:
    return suggestion(name, known, before="--")


def _merge(base: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _set(data: dict[str, Any], path: tuple[str, ...], value: Any, mistakes: list[str]) -> None:
    node = data
    for part in path[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            mistakes.append(f"{part}: expected a mapping, found {child!r}")
            return
        node = child
    node[path[-1]] = value


def _has(data: dict[str, Any], path: tuple[str, ...]) -> bool:
    node: Any = data
    for part in path:
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def command_line(prog: str, argv: Sequence[str] | None = None) -> str:
    """Return the command as typed, for cards and reports."""
    import shlex

    return shlex.join([*prog.split(), *(sys.argv[1:] if argv is None else argv)])
