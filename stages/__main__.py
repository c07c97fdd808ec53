"""The command `distil`: the make targets of both stages as sub-commands, without a checkout."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.nearest import did_you_mean
from pipeline.errors import ConfigError, run_command
from pipeline.program import VERSION, module_name
from stages.flags import take_flag

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "preview": "stages.preview",
    "distill": "stages.distill",
    "prepare-corpus": "stages.prepare_corpus",
    "cache-teacher": "stages.cache_teacher",
    "check-cache": "stages.check_cache",
    "train-student": "stages.train_student",
    "sweep": "stages.sweep",
    "rounds": "stages.rounds",
    "score-student": "stages.score_student",
    "eval-student": "stages.eval_student",
    "push-student": "stages.push_student",
    "report": "stages.report",
    "prefetch": "stages.prefetch",
    "cache": "pipeline.cache.__main__",
}
_HELP = ("-h", "--help", "help")
_NPROC, _GPUS = "--nproc", "--gpus"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with the arguments after its name; without any, list the commands.

    Raises:
        ConfigError: there is no such command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in _HELP:
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(VERSION)
        return 0
    name, rest = arguments[0].replace("_", "-"), arguments[1:]
    if name not in COMMANDS:
        raise ConfigError(
            f"{arguments[0]}: unknown command",
            expected="one of " + ", ".join(COMMANDS),
            do=did_you_mean(name, COMMANDS),
        )
    if name == "train-student":
        rest, nproc = _take_nproc(rest)
        if nproc > 1:
            return _train_by_launcher(rest, nproc)
    if name == "cache-teacher" and any(token.split("=")[0] in (_NPROC, _GPUS) for token in rest):
        from stages.workers import main as run_workers

        return run_workers(rest)
    module = importlib.import_module(module_name(COMMANDS[name]))
    return int(module.main(rest) or 0)


def console() -> int:
    """Run `main` as a program: a mistake of the user is one message and an exit code."""
    return run_command(main)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {_purpose(module)}" for name, module in COMMANDS.items()]
    return "\n".join(
        [
            "usage: distil COMMAND [--option value ...]",
            "",
            *lines,
            "",
            f"  train-student {_NPROC} N trains with N processes of this machine;",
            f"  cache-teacher {_GPUS} all (or {_NPROC} N) starts a worker for each teacher.",
            "  distil COMMAND --help lists all options of a command.",
        ]
    )


def _purpose(module: str) -> str:
    """Return what a module's first line says, without importing it."""
    spec = importlib.util.find_spec(module_name(module))
    assert spec is not None
    assert spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    line = text.split("\n", 1)[0].split("COMMAND`: ", 1)[-1]
    return line[0].upper() + line[1:]


def _take_nproc(arguments: Sequence[str]) -> tuple[list[str], int]:
    """Return the arguments without `--nproc`, and its value.

    Raises:
        ConfigError: no number.
    """
    rest, given = take_flag(arguments, _NPROC)
    value = "1" if given is None else given
    if not value.isdigit() or not int(value):
        raise ConfigError(f"{_NPROC}: found {value!r}", expected="a number of processes, from 1")
    return rest, int(value)


def _train_by_launcher(arguments: Sequence[str], nproc: int) -> int:
    """Check with one process first: a launcher shows a mistake once a rank, with its own trace."""
    from stages.distill import trainer

    checked = subprocess.run([*trainer(1), *arguments, "--check"], check=False)
    if checked.returncode:
        return checked.returncode
    return subprocess.run([*trainer(nproc), *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(console())
