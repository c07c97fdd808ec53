"""What looks wrong in the first rows of a corpus, with what to do: where runs go wrong unseen."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipeline.corpus.bad_rows import are_too_many
from pipeline.corpus.intake import Intake
from pipeline.corpus.preview.record import Finding, Totals
from pipeline.corpus.preview.seen import First, Seen
from pipeline.corpus.prompts import PromptIntake

__all__ = ["findings_of"]

_MANY_CUT = 0.1
"""Of the rows."""
_MUCH_CUT = 0.05
"""Of the tokens."""
_MARKUP = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|</?(?:start|end)_of_turn>|\[/?(?:INST|SYS|TOOL_CALLS)\]"
    r"|<\uff5c[^\uff5c<>]{1,40}\uff5c>"
)
"""How templates name special tokens."""


def findings_of(intake: Intake, totals: Totals, seen: Seen) -> Iterator[Finding]:
    """Yield what is suspicious, the gravest first."""
    yield from _of_rows(intake, totals, seen)
    if isinstance(intake, PromptIntake):
        yield from _of_prompts(intake, seen)
    else:
        yield from _of_masks(intake, totals, seen)
    yield from _of_tokens(intake, seen)
    yield from _of_lengths(intake, totals)
    yield from _of_split(intake, totals, seen)


def _of_rows(intake: Intake, totals: Totals, seen: Seen) -> Iterator[Finding]:
    settings = intake.settings
    if totals.rows and not totals.used:
        yield Finding(
            f"none of the first {totals.rows} rows can be used",
            "check --corpus.format, --corpus.loss_on and --chat_template",
        )
    if totals.bad and settings.on_bad_row == "refuse":
        yield Finding(
            f"{totals.bad} of {totals.rows} rows cannot be used, and the run stops for any",
            "mend them, or leave them out with --corpus.on_bad_row quarantine",
        )
    elif totals.bad and are_too_many(totals.bad, totals.rows, settings):
        yield Finding(
            f"{totals.bad} of {totals.rows} rows cannot be used: so many stop the run",
            "mend them (--rows quarantined shows one), or raise --corpus.max_quarantined_fraction",
        )
    if seen.lost_system.rows:
        yield Finding(
            f"the template ignores system messages, and {_rows(seen.lost_system)} with one cannot "
            "be used",
            "give a --chat_template that renders them, or take them out of the data",
        )


def _of_masks(intake: Intake, totals: Totals, seen: Seen) -> Iterator[Finding]:
    settings = intake.settings
    if totals.counts.get("dropped_no_labels"):
        number = f", first row {seen.nothing.number}" if seen.nothing.rows else ""
        yield Finding(
            f"{totals.counts['dropped_no_labels']} samples have no supervised token and are left "
            f"out{number}",
            "where answers were expected, check the roles above, --corpus.format and --max_length",
        )
    if seen.everything.rows and settings.loss_on == "assistant":
        yield Finding(
            f"in {_rows(seen.everything)} everything is supervised, questions included",
            "give a --chat_template that puts a generation prompt before answers",
        )
    if totals.unended:
        ends = "" if intake.renderer is None else ", ".join(map(repr, intake.renderer.ends))
        yield Finding(
            f"{totals.unended} of {totals.turns} supervised turns have no end of turn in the loss "
            f"({ends or 'the model names none'}), so a student does not learn to stop",
            "give a --chat_template that ends turns with such a token, or add it to the model's "
            "generation_config.json",
        )
    if seen.unlike_marks.rows:
        yield Finding(
            f"the mask of {seen.unlike_marks.rows} of {seen.compared} chats is not what the "
            f"template's {{% generation %}} marks (first row {seen.unlike_marks.number})",
            "see that row; empty answers and thoughts are context unless "
            "--corpus.supervise_empty, all else is the template's mistake",
        )


def _of_prompts(intake: Intake, seen: Seen) -> Iterator[Finding]:
    template = None if intake.renderer is None else intake.renderer.template
    if template is not None and seen.chats:
        if not (template.generation_prompt or template.missing_header):
            yield Finding(
                "the template has no generation prompt: the teacher goes on with the question",
                "give a --chat_template with one (add_generation_prompt)",
            )
        if template.end_of_turn() is None:
            yield Finding(
                "no special token ends a turn of the template: answers run to max_new_tokens "
                "unless the model's files name an end",
                "give a --chat_template that ends turns with a special token",
            )


def _of_tokens(intake: Intake, seen: Seen) -> Iterator[Finding]:
    bos = intake.tokenizer.bos_token
    if seen.double_bos.rows:
        yield Finding(
            f"{_rows(seen.double_bos)} with {bos!r} twice at the beginning",
            "take it out of the template, or out of the data's text",
        )
    if seen.without_bos.rows:
        yield Finding(
            f"{_rows(seen.without_bos)} without {bos!r}, which the tokenizer itself puts before a "
            "text",
            "check that the teacher was trained on such chats, or give a --chat_template that "
            "begins with it",
        )
    missing = sorted(_unknown_markup(intake))
    if missing:
        yield Finding(
            f"the template writes {', '.join(map(repr, missing[:4]))}, for which the tokenizer has "
            "no token: it becomes plain text",
            "use the template or the tokenizer that the teacher was trained with",
        )
    if seen.spelled:
        names = ", ".join(repr(name) for name, _ in seen.spelled.most_common(4))
        yield Finding(
            f"{_rows(seen.spelling)} whose text spells out {names}: it becomes the special token",
            "take it out of the text, unless that is meant",
        )
    if seen.unknown.rows:
        yield Finding(
            f"{_rows(seen.unknown)} with the unknown token {intake.tokenizer.unk_token!r}",
            "use the tokenizer that the teacher was trained with, or clean the text",
        )


def _of_lengths(intake: Intake, totals: Totals) -> Iterator[Finding]:
    settings, counts = intake.settings, totals.counts
    cut, lost = counts.get("truncated_rows", 0), counts.get("truncated_tokens", 0)
    all_tokens = totals.tokens + lost
    if totals.rows and (cut > _MANY_CUT * totals.rows or lost > _MUCH_CUT * all_tokens):
        yield Finding(
            f"{cut} of {totals.rows} rows are cut ({cut / totals.rows:.0%}), {lost} of "
            f"{all_tokens} tokens are lost ({lost / all_tokens:.0%})",
            f"raise --max_length (now {settings.longest}), or keep the rest with "
            "--corpus.overlong split"
            if not isinstance(intake, PromptIntake)
            else f"raise --max_length (now {settings.longest}), or lower --generate.max_new_tokens",
        )
    dropped = counts.get("dropped_overlong", 0)
    if totals.rows and dropped > _MANY_CUT * totals.rows:
        yield Finding(
            f"{dropped} of {totals.rows} rows are too long and left out",
            f"raise --max_length (now {settings.longest}), or set --corpus.overlong truncate",
        )


def _of_split(intake: Intake, totals: Totals, seen: Seen) -> Iterator[Finding]:
    if totals.is_all and totals.used and not totals.heldout_rows:
        yield Finding(
            "no row is held out: there is nothing to evaluate a student on",
            "give more rows, or a larger --corpus.heldout_fraction",
        )
    if seen.repeated.rows:
        yield Finding(
            f"{_rows(seen.repeated)} that repeat an earlier one: a held-out row may be trained on",
            "take repeated rows out of the data",
        )


def _unknown_markup(intake: Intake) -> set[str]:
    """Return what the template writes like a special token, and the tokenizer knows no such."""
    if intake.renderer is None:
        return set()
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = intake.renderer.template.render_or_empty(chat, None, prompt=True)
    known = intake.tokenizer.get_vocab()
    return {name for name in _MARKUP.findall(text) if name not in known}


def _rows(found: First) -> str:
    what = "row" if found.rows == 1 else "rows"
    return f"{found.rows} {what} (first row {found.number})"
