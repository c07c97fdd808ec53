"""Typed, frozen configuration: YAML or JSON files below flags, all mistakes reported at once."""

from pipeline.config.command import Command, DefaultFile, parse_command
from pipeline.config.schema import Settings, dump_yaml, fingerprint, option, rule

__all__ = [
    "Command", "DefaultFile", "Settings", "dump_yaml", "fingerprint", "option", "parse_command",
    "rule",
]  # fmt: skip
