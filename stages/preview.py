"""Show the first rows of the corpus as the teacher will read them; nothing is loaded or written."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.api.settings import StudentRun, TeacherRun
from pipeline.config import option, parse_command
from pipeline.errors import StoreError, run_command
from pipeline.program import command_name
from stages.defaults import TEACHER_DEFAULT, report_teacher_default

if TYPE_CHECKING:
    from pipeline.corpus.preview.record import Preview

__all__ = ["PreviewRun", "main", "preview_of", "print_preview"]

PROG = command_name("stages.preview")
_ROWS = "0:3"
_SAMPLE_ROWS = 1000
_SHOWN_TOKENS = 800


class PreviewRun(TeacherRun):
    """All settings of stage one, and what is shown."""

    rows: str = option(
        _ROWS,
        "rows to show, separated by commas: a number from 0, a range 0:5, or the first that is "
        "truncated, quarantined, dropped (no supervised token, or too long), heldout or longest; "
        "truncated:3 shows three",
    )
    sample_rows: int = option(
        _SAMPLE_ROWS, "first rows that are read for counts, lengths and warnings", ge=1
    )
    shown_tokens: int | None = option(
        _SHOWN_TOKENS,
        "tokens of a row that the terminal shows, without the middle of longer ones; none shows "
        "all. A page shows all",
        ge=2,
    )
    html: str | None = option(None, "write the preview as this one HTML file, too")


def main(argv: Sequence[str] | None = None) -> int:
    """Read the first rows with the teacher's tokenizer; print them, and write a page if asked."""
    command = parse_command(
        PreviewRun,
        list(sys.argv[1:] if argv is None else argv),
        prog=PROG,
        description=__doc__ or "",
        examples=[
            f"{PROG} --teacher_model Qwen/Qwen2-7B-Instruct --dataset_name chats.jsonl",
            f"{PROG} --config my-teacher.yaml --rows 0:2,truncated,quarantined --html preview.html",
        ],
        elsewhere={"stage two, train-student": StudentRun},
        default=TEACHER_DEFAULT,
    )
    run = command.settings
    from pipeline.corpus.preview.choice import choose_rows
    from pipeline.observe.logs import configure_logging

    choose_rows(run.rows)  # before anything is fetched
    configure_logging(run.observe.log_level)
    report_teacher_default(command)
    preview = preview_of(run, rows=run.rows, sample_rows=run.sample_rows)
    print_preview(preview, shown_tokens=run.shown_tokens)
    if run.html is not None:
        _write_page(preview, Path(run.html))
    return 0


def preview_of(run: TeacherRun, *, rows: str = _ROWS, sample_rows: int = _SAMPLE_ROWS) -> Preview:
    """Read the first rows of the corpus that a run of stage one would prepare.

    Raises:
        DistillError: the run could not read its corpus; several mistakes are one error.
    """
    from pipeline.corpus.preview.choice import choose_rows
    from pipeline.corpus.preview.collect import preview_corpus
    from pipeline.corpus.preview.record import Fact
    from pipeline.teacher.prepare import open_corpus

    work = open_corpus(
        run.teacher,
        run.corpus,
        seed=run.seed,
        cache_url=run.cache_dir,
        generate=run.generate,
        few=True,
    )
    task = "reads the rows"
    if run.generate.enabled:
        each = run.generate.responses
        task = f"answers the rows, {each} response{'s' if each > 1 else ''} each"
    facts = [
        Fact("teacher", f"{run.teacher.model} {task}; only its tokenizer and config are read"),
        Fact("cache", f"{run.cache_dir}, where stage one will write; now nothing is written"),
    ]
    return preview_corpus(work.intake, choose_rows(rows), sample_rows=sample_rows, facts=facts)


def print_preview(preview: Preview, *, shown_tokens: int | None = _SHOWN_TOKENS) -> None:
    """Print a preview; in colour on a terminal, unless NO_COLOR is set."""
    from pipeline.corpus.preview.terminal import render_text

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    text = render_text(preview, colour=colour, shown_tokens=shown_tokens)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def _write_page(preview: Preview, file: Path) -> None:
    from pipeline.corpus.preview.page import render_html

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(render_html(preview), encoding="utf-8")
    except OSError as error:
        raise StoreError(
            f"html: {file} cannot be written ({error.strerror})",
            expected="a file that can be made",
            do="choose another --html",
        ) from None
    print(f"page {file}")


if __name__ == "__main__":
    sys.exit(run_command(main))
