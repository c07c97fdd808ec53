"""Write `stages/README.md`, every command with all its options, from the settings themselves."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config import Settings
from pipeline.config.fields import Leaf, leaves
from pipeline.config.helptext import shown_value
from pipeline.errors import EXIT_CODES, run_command

__all__ = ["main", "page"]

PAGE = Path(__file__).with_name("README.md")
_COMMANDS = (
    ("preview", "PreviewRun", "make preview"),
    ("prepare_corpus", "TeacherRun", "make prepare-corpus"),
    ("cache_teacher", "TeacherRun", "make cache-teacher"),
    ("train_student", "StudentRun", "make train-student"),
    ("distill", "DistillRun", "make distill"),
    ("sweep", "SweepRun", "make sweep"),
    ("rounds", "RoundsRun", "make rounds"),
    ("score_student", "ScoreRun", "make score-student"),
    ("eval_student", "EvalRun", "make eval-student"),
    ("push_student", "PushRun", "make push-student"),
    ("report", "ReportRun", "make report"),
)
_INTRODUCTION = """# Commands and their options

`make options` writes this page from the settings; a test compares the two. Each command is a
module, `python -m stages.NAME`, and a make target that installs what it needs first. Through make,
options are passed as `ARGS="--option value"`.

- An option is named by its dotted path (`--teacher.model`), by its short name (`--teacher_model`),
  or by its last part where no other option has that (`--keep_layers`). `-` and `_` are the same.
- Values come from the defaults, then from files (`--config FILE`, YAML or JSON, may be repeated),
  then from flags; the later wins. `configs/` holds files to start from.
- A list is `1,2` or several words. `--no-NAME` is false. `none` is no value, where the type has it.
- All mistakes are reported at once, before anything starts.

"""


def page() -> str:
    """Return the page."""
    parts = [_INTRODUCTION + "\n".join(_exit_codes())]
    for module_name, settings, target in _COMMANDS:
        module = importlib.import_module(f"stages.{module_name}")
        parts.append("\n".join(_command(module_name, getattr(module, settings), module, target)))
    return "\n".join(parts)


def _exit_codes() -> Iterator[str]:
    """Yield the table of the exit codes of all commands, `python -m pipeline.cache` included."""
    yield from ("", "## Exit codes", "")
    yield "Of every command, `python -m pipeline.cache` and `python -m k8s` included."
    yield from ("", "| code | meaning |", "|---|---|")
    yield from (f"| {code} | {meaning} |" for code, meaning in sorted(EXIT_CODES.items()))
    yield ""


def _command(name: str, settings: type[Settings], module: object, target: str) -> Iterator[str]:
    """Yield the lines of one command."""
    yield f"## {name}"
    yield ""
    yield f"`{target}`, or `python -m stages.{name}`. {' '.join((module.__doc__ or '').split())}"
    yield ""
    for switch, meaning in _switches(module):
        yield f"- `{switch}`: {meaning}"
    section: str | None = None
    for leaf in leaves(settings):
        head = ".".join(leaf.path[:-1])
        if head != section:
            section = head
            yield from ("", f"### {name}: {head or 'general'}", "")
            yield from ("| option | type | default | meaning |", "|---|---|---|---|")
        yield _row(leaf)
    yield ""


def _row(leaf: Leaf) -> str:
    names = f"`--{leaf.dotted}`" + (f", `--{leaf.flag}`" if leaf.flag else "")
    default = "required" if leaf.required else _default(leaf.default)
    cells = (names, leaf.kind.replace(" | ", ", "), default, leaf.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: object) -> str:
    if value == sys.executable:  # another on every machine
        return "the interpreter in use"
    return f"`{shown_value(value)}`" if value != "" else "empty"


def _switches(module: object) -> Iterator[tuple[str, str]]:
    """Yield the switches of a command, which `--help` lists before the options."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        module.main(["--help"])  # type: ignore[attr-defined]
    # Switches are arguments of `parse_command`; its help is the one place that lists them.
    block = text.getvalue().split("\ncommand:\n", 1)[1].split("\n\n", 1)[0]
    name, meaning = "", list[str]()
    for line in [*block.splitlines(), "  --end"]:
        if line.startswith("  --"):
            if name and not name.startswith(("--config", "--help")):
                yield name, " ".join(meaning)
            name, meaning = line.strip(), []
        else:
            meaning.append(line.strip())


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page beside this file."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
