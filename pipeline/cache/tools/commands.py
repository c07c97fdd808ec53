"""The command line of `python -m pipeline.cache`: commands, flags, examples, suggestions."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from pipeline.cache.layout.names import CHECKS, FOREIGN, SPLITS, parse_shard
from pipeline.errors import ConfigError
from pipeline.program import command_name

__all__ = ["PROG", "HelpShown", "parse", "usage"]

PROG = command_name("pipeline.cache")
_URL = (
    "a folder, or any address fsspec opens, such as s3://bucket/cache or hf://datasets/owner/name"
)
_EXAMPLES = {
    "inspect": ("inspect runs/default/cache", "inspect s3://bucket/cache --json"),
    "verify": ("verify s3://bucket/cache --workers 8", "verify runs/default/cache --check size"),
    "stats": ("stats runs/default/cache --columns", "stats s3://bucket/cache --json"),
    "repair": (
        "repair runs/default/cache --dry-run",
        "repair s3://bucket/cache --shards train-00003,train-00017",
    ),
    "slice": (
        "slice s3://bucket/cache runs/small --samples 1000 --top-k 16",
        "slice runs/default/cache runs/heldout --split heldout",
    ),
    "merge": (
        "merge s3://east/part s3://west/part s3://bucket/whole",
        "merge runs/chat/cache runs/code/cache runs/both",
    ),
    "export": ("export runs/default/cache runs/default/plain --top-k 32",),
    "import": (
        "import logits/ runs/imported --format distillkit --tokenizer models/teacher",
        "import s3://bucket/logits runs/imported --format plain --tokenizer hf://owner/teacher",
    ),
    "push": (
        "push runs/default/cache hf://datasets/me/teacher-cache --license apache-2.0",
        "push runs/default/cache s3://bucket/cache --license other --license-name in-house",
    ),
    "pull": (
        "pull hf://datasets/me/teacher-cache runs/pulled",
        "pull s3://bucket/cache runs/pulled --workers 8",
    ),
}


class HelpShown(Exception):
    """`--help` was requested; carries the text."""


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as a `ConfigError` instead of a usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `ConfigError`."""
        raise ConfigError(f"{self.prog}: {message}", do=f"see {self.prog} --help")

    def print_help(self, file: object = None) -> None:
        """Raise the text: only the entry point prints."""
        raise HelpShown(self.format_help())


def parse(given: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line: `command`, its addresses and flags, and `given` as typed.

    Raises:
        ConfigError: an unknown command, unknown flags (all of them), missing or wrong values.
        HelpShown: `--help`.
    """
    parser, commands = _build()
    first = given[0] if given else ""
    if first not in commands and first not in _HELP:
        raise ConfigError(_no_command(first, commands), expected=f"one of {', '.join(commands)}")
    if first in _HELP:
        return parser.parse_args(list(given))
    sub = commands[first]
    tokens = [first, *map(_with_dashes, given[1:])]
    mistakes = list(_mistakes(tokens[1:], sub))
    try:
        options, rest = parser.parse_known_args([first, *_addresses_last(tokens[1:], sub)])
        mistakes += [f"{token!r} is one address too many" for token in rest if token[:1] != "-"]
    except ConfigError as error:
        if not mistakes:
            raise
        if "required" in error.found:
            mistakes.append(error.found.partition(": ")[2])
    # The value of an unknown flag is an address too many, or a required one: said once.
    if any(": unknown flag" in mistake for mistake in mistakes):
        mistakes = [m for m in mistakes if "one address too many" not in m]
    if mistakes:
        raise ConfigError(f"{sub.prog}: {'; '.join(mistakes)}", do=f"see {sub.prog} --help")
    options.given = list(given)
    return options


def usage() -> str:
    """Return the text of `--help`."""
    return _build()[0].format_help()


_HELP = ("-h", "--help")


def _no_command(first: str, commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """Say what stands where a command should; a flag is named with its command."""
    near = _near(first, list(commands))
    if near or not first.startswith("-"):
        return f"{first!r} is not a command{near}"
    return f"{first!r} stands before the command"


def _with_dashes(token: str) -> str:
    """Return a flag with `-` for `_`: the stages take both."""
    flag, equals, value = token.partition("=")
    return f"{flag.replace('_', '-')}{equals}{value}" if token.startswith("--") else token


def _addresses_last(tokens: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return the flags with their values, then the addresses.

    argparse does not take `merge A --workers 2 B C`: several addresses have to stand together.
    """
    flags: list[str] = []
    addresses: list[str] = []
    waiting = False
    for place, token in enumerate(tokens):
        if token == "--":
            addresses += tokens[place + 1 :]
            break
        is_flag = token.startswith("-") and not _is_number(token)
        (flags if is_flag or waiting else addresses).append(token)
        action = parser._option_string_actions.get(token)
        waiting = is_flag and action is not None and action.nargs != 0
    # A flag at the end lacks its value: an address must not become that.
    return [*flags[:-1], *addresses, flags[-1]] if waiting else [*flags, *addresses]


def _mistakes(tokens: Sequence[str], parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield every unknown flag with the nearest known one, and every value that does not fit.

    argparse stops at the first of them, and knows no near names.
    """
    known = parser._option_string_actions
    for place, token in enumerate(tokens):
        flag, equals, value = token.partition("=")
        if token == "--":
            return
        if not flag.startswith("-") or _is_number(flag):
            continue
        action = known.get(flag)
        if action is None:
            long = [name for name in known if name.startswith("--")]
            yield f"{flag}: unknown flag{_near(flag, long)}"
        elif action.nargs != 0 and (equals or place + 1 < len(tokens)):
            yield from _value_mistakes(flag, action, value if equals else tokens[place + 1])


def _value_mistakes(flag: str, action: argparse.Action, value: str) -> Iterator[str]:
    if value.startswith("-") and not _is_number(value):
        return  # another flag: argparse says that the value is missing
    if action.choices is not None and value not in action.choices:
        choices = list(action.choices)
        near = _near(value, choices)
        yield f"{flag}: found {value!r}, expected {' or '.join(choices)}{near}"
    elif callable(action.type):
        try:
            action.type(value)
        except argparse.ArgumentTypeError as error:
            yield f"{flag}: {error}"


def _is_number(token: str) -> bool:
    return token[:1] == "-" and token[1:2].isdigit()


def _near(name: str, known: list[str]) -> str:
    from pipeline.config.fields import suggestion

    bare = {item.lstrip("-"): item for item in known}
    near = suggestion(name.lstrip("-"), list(bare))
    for plain, item in bare.items():
        near = near.replace(f" {plain}?", f" {item}?")
    return near


def _build() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog=PROG,
        description=f"Inspect, check and convert teacher caches. URL, SOURCE and TARGET "
        f"are {_URL}. The source comes first, the target last.",
        epilog=_examples([examples[0] for examples in _EXAMPLES.values()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    commands: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, text: str, *addresses: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=text,
            description=f"{text}.\nAddresses are {_URL}.",
            epilog=_examples(_EXAMPLES[name]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for address in addresses:
            sub.add_argument(address.lower(), metavar=address)
        commands[name] = sub
        return sub

    sub = command("inspect", "summarise what the cache holds, complete or not", "URL")
    _add_json(sub)

    sub = command("verify", "compare every file with its checksum, or decode every row too", "URL")
    _add_check(sub)
    _add_workers(sub)
    _add_json(sub)

    text = "exact statistics: entries, bytes by column, kept mass, entropy, the teacher's own loss"
    sub = command("stats", text, "URL")
    text = "the bytes of each column of the files too"
    sub.add_argument("--columns", action="store_true", help=text)
    sub.add_argument("--shards", action="store_true", help="each shard, however many there are")
    _add_workers(sub)
    _add_json(sub)

    text = (
        "write damaged and missing files again, to the same bytes, with the cache's configuration"
    )
    sub = command("repair", text, "URL")
    sub.add_argument("--dry-run", action="store_true", help="print what would be done")
    text = (
        "run code that the teacher brings, where the cache's configuration says so; read it first"
    )
    sub.add_argument("--trust-remote-code", action="store_true", help=text)
    which = sub.add_mutually_exclusive_group()
    text = "make just these again, such as train-00003,heldout-00000; nothing is verified before"
    which.add_argument("--shards", type=_shards, metavar="NAMES", help=text)
    _add_check(which)
    _add_workers(sub)

    text = "a smaller cache: fewer entries a position, a subset of the samples, one split"
    sub = command("slice", text, "SOURCE", "TARGET")
    sub.add_argument("--top-k", type=_count, metavar="K", help="only the K largest entries")
    text = "of a sampled cache: every tau F times larger, F at least 1; fewer entries, without bias"
    sub.add_argument("--tau-factor", type=_factor, metavar="F", help=text)
    part = sub.add_mutually_exclusive_group()
    text = "N samples, by a hash of their ids: the same on any machine"
    part.add_argument("--samples", type=_count, metavar="N", help=text)
    text = "about this share of them, by the same hash"
    part.add_argument("--fraction", type=_share, metavar="F", help=text)
    part.add_argument("--ids", metavar="FILE", help="the samples with these ids, one per line")
    text = "train or heldout: only this one; it becomes the training split of the new cache"
    sub.add_argument("--split", type=_split, metavar="NAME", help=text)
    _add_workers(sub)

    text = "join caches: parts of one, or those of several teachers"
    sub = command("merge", text)
    sub.add_argument("sources", metavar="SOURCE", nargs="+", help="the caches to join")
    sub.add_argument("target", metavar="TARGET", help="the new cache; it comes last")
    _add_workers(sub)

    text = "write plain Parquet lists with tokenizer and card, which any other trainer reads"
    sub = command("export", text, "SOURCE", "TARGET")
    sub.add_argument("--top-k", type=_count, metavar="K", help="only the K largest entries")

    text = "make a top-k cache of other projects' Parquet files; it serves temperature 1 alone"
    sub = command("import", text, "SOURCE", "TARGET")
    text = "whose columns: one of %(choices)s; plain has input_ids, target_ids, target_logprobs"
    sub.add_argument("--format", choices=FOREIGN, required=True, help=text)
    text = "the model's folder or address whose tokenizer made the ids; required"
    sub.add_argument("--tokenizer", metavar="URL", help=text)
    text = "rows of the teacher's head (default: of the config.json beside the tokenizer)"
    sub.add_argument("--vocab-size", type=_count, metavar="V", help=text)
    text = "the teacher's name, for the card"
    sub.add_argument("--teacher", metavar="NAME", default="unknown", help=text)
    text = "other names of columns: target_ids=ids,target_logprobs=log_probs"
    sub.add_argument("--columns", metavar="OURS=THEIRS", help=text)
    text = "of DistillKit: how it compressed (default: compression_config.yaml beside the files)"
    sub.add_argument("--compression", metavar="FILE", help=text)
    text = "share of rows held out (default: 0.05)"
    sub.add_argument("--heldout-fraction", type=_part, metavar="F", default=0.05, help=text)
    text = "tokens in a shard, at most (default: 1000000)"
    sub.add_argument("--shard-tokens", type=_count, metavar="N", default=1_000_000, help=text)

    text = "publish a cache: to a data set of the hub or any store, with the licence you state"
    sub = command("push", text, "SOURCE", "TARGET")
    text = "by the terms of the teacher and of the corpus, such as apache-2.0; required"
    sub.add_argument("--license", metavar="ID", help=text)
    sub.add_argument("--license-name", metavar="NAME", help="of a licence that is `other`")
    sub.add_argument("--license-link", metavar="URL", help="where its text is")
    text = "what the teacher's terms say of its outputs, for the card: a sentence or an address"
    sub.add_argument("--teacher-terms", metavar="TEXT", help=text)
    who = sub.add_mutually_exclusive_group()
    text = "a data set of the hub that is made here is private"
    who.add_argument("--private", action="store_true", help=text)
    who.add_argument("--public", action="store_true", help="it is public")
    _add_travel(sub)

    sub = command("pull", "copy a cache from the hub or any store, compared", "SOURCE", "TARGET")
    _add_travel(sub)
    return parser, commands


def _examples(lines: Sequence[str]) -> str:
    return "examples:\n" + "\n".join(f"  {PROG} {line}" for line in lines)


def _add_json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print JSON for programs")


def _add_check(sub: argparse._ActionsContainer) -> None:
    text = (
        "what is compared of the shards: size (nothing is read); checksum (the default: every "
        "byte; finds whatever has changed since it was written); decode (every row too; finds what "
        "a wrong writer wrote)"
    )
    sub.add_argument("--check", choices=CHECKS, default=CHECKS[1], help=text)


def _add_travel(sub: argparse.ArgumentParser) -> None:
    text = (
        "how what has arrived is compared: checksum (the default: read back); size (for a store "
        "that is trusted). The hub computes digests itself"
    )
    sub.add_argument("--check", choices=CHECKS[:2], default=CHECKS[1], help=text)
    text = "take the prepared corpus along, which only stage one reads"
    sub.add_argument("--with-corpus", action="store_true", help=text)
    _add_workers(sub)


def _add_workers(sub: argparse.ArgumentParser) -> None:
    text = "shards read at one time (default: the cores, at most 8)"
    sub.add_argument("--workers", type=_count, metavar="N", help=text)


def _unfit(text: str, expected: str) -> argparse.ArgumentTypeError:
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    return argparse.ArgumentTypeError(f"found {shown!r}, expected {expected}")


def _count(text: str) -> int:
    # No cache holds more: and `int` takes no more than 4,300 digits.
    if not text.isdecimal() or len(text) > 15 or int(text) < 1:
        raise _unfit(text, "a whole number, at least 1")
    return int(text)


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise _unfit(text, "a number, at least 1")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise _unfit(text, "a number above 0 and at most 1")
    return value


def _part(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else _share(text)


def _shards(text: str) -> list[tuple[str, int]]:
    labels = [label.strip() for label in text.split(",")]
    found = [parse_shard(label) for label in labels]
    wrong = [label for label, key in zip(labels, found, strict=True) if key is None]
    if wrong:
        raise argparse.ArgumentTypeError(
            f"found {', '.join(map(repr, wrong))}, expected names such as train-00003, by commas"
        )
    return [key for key in found if key is not None]


def _split(text: str) -> str:
    if text not in SPLITS:
        near = _near(text, list(SPLITS))
        raise _unfit(text, f"{' or '.join(SPLITS)}{near}")
    return text
