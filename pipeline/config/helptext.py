"""The text of `--help`: every field with type, default and meaning, grouped by section."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.fields import Leaf

__all__ = ["help_text", "shown_value"]

_WIDTH = 96
_INDENT = " " * 8


def help_text(
    all_leaves: list[Leaf],
    prog: str,
    description: str,
    switches: Mapping[str, str],
    examples: Sequence[str],
) -> str:
    """Render the help page, independent of the terminal, so that it is the same in a log."""
    lines = [f"usage: {prog} [--config FILE] [--field value ...]", ""]
    lines += textwrap.wrap(description, _WIDTH)
    if examples:
        lines += ["", "examples:"] + [f"  {example}" for example in examples]
    lines += ["", "command:"]
    lines += _entry(
        "--config FILE (also --config_file)", "YAML or JSON; may be repeated, the last wins"
    )
    for name, text in switches.items():
        lines += _entry(f"--{name.replace('_', '-')}", text)
    lines += _entry("--help", "this page")
    section: str | None = None
    for leaf in all_leaves:
        head = ".".join(leaf.path[:-1])
        if head != section:
            section = head
            lines += ["", f"{head or 'general'}:"]
        names = f"--{leaf.dotted}" + (f", --{leaf.flag}" if leaf.flag else "")
        default = "required" if leaf.required else f"default {shown_value(leaf.default)}"
        lines += _entry(f"{names} <{leaf.kind}> ({default})", leaf.help)
    return "\n".join(lines)


def _entry(head: str, text: str) -> list[str]:
    body = textwrap.wrap(text, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    return [f"  {head}", *body]


def shown_value(value: Any) -> str:
    """Return a default as a user would type it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(shown_value(item) for item in value) + "]"
    return str(value)
