"""What was detected of a data set, its chats and their template, and why; what applies to them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.corpus.chat.rendering.render import ChatRenderer
from pipeline.corpus.chat.rendering.template import ChatTemplate, template_variables
from pipeline.corpus.intake import Intake
from pipeline.corpus.preview.record import Fact
from pipeline.corpus.preview.seen import Seen
from pipeline.corpus.preview.wording import number_of
from pipeline.corpus.prompts import PromptIntake
from pipeline.corpus.sources.files import FilesSource
from pipeline.corpus.sources.hub import StreamedSource
from pipeline.corpus.sources.packed import PACKED
from pipeline.corpus.sources.readers import data_suffix

__all__ = ["detected"]

_PROBE = "QXPROBEZJWVKQ"
_THINKING = ("enable_thinking", "thinking", "reasoning_effort", "thinking_budget")


def detected(intake: Intake, seen: Seen) -> Iterator[Fact]:
    """Yield what is known of a corpus, one line each."""
    yield Fact("data set", _source(intake))
    yield Fact("format", _format(intake))
    if seen.roles:
        yield Fact("roles", _roles(seen.roles))
    yield Fact("tokenizer", _tokenizer(intake.tokenizer))
    if intake.renderer is not None and (seen.chats or not seen.documents):
        yield from _of_chats(intake, intake.renderer, seen)
    if seen.documents:
        yield Fact("documents", _documents(intake))
    yield Fact("supervised", _supervised(intake))
    yield Fact("length", _length(intake))
    yield Fact("held out", _heldout(intake))
    yield Fact("bad rows", _bad_rows(intake))


def _source(intake: Intake) -> str:
    settings, source = intake.settings, intake.reading.source
    if isinstance(source, FilesSource):
        kinds = Counter(_kind(file.name) for file in source.files)
        size = sum(file.size for file in source.files)
        files = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        of_all = f"{files} (by the names of the files), {_size(size)}"
    else:
        rows = "rows not counted" if source.total is None else f"{source.total} rows"
        streamed = ", only the first of them fetched" if isinstance(source, StreamedSource) else ""
        of_all = f"{source.name}, {rows}{streamed}"
    limit = settings.num_samples
    first = "" if limit is None else f"; only the first {limit} rows are read (corpus.num_samples)"
    return f"{settings.dataset_name}: {of_all}{first}"


def _kind(name: str) -> str:
    packed = next((end for end in PACKED if name.lower().endswith(end)), "")
    return f"{data_suffix(name)}{packed}"


def _size(count: int) -> str:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.3g} {unit}"
    return f"{count} bytes"


def _format(intake: Intake) -> str:
    columns = intake.reading.format
    if columns is None:
        return f"{intake.reading.format_name}: each row by its own column, messages or text"
    unused = f"; not read: {', '.join(columns.unused)}" if columns.unused else ""
    return f"{columns.name}: {columns.why}; read: {', '.join(columns.used)}{unused}"


def _roles(roles: Counter[tuple[str, str]]) -> str:
    return ", ".join(
        f"{theirs} → {ours} ({count})" if theirs != ours else f"{ours} ({count})"
        for (theirs, ours), count in roles.most_common()
    )


def _tokenizer(tokenizer: Any) -> str:
    special = [
        f"{name} {getattr(tokenizer, f'{name.lower()}_token')!r}"
        for name in ("BOS", "EOS")
        if getattr(tokenizer, f"{name.lower()}_token") is not None
    ]
    return f"{len(tokenizer)} tokens, {', '.join(special) or 'neither BOS nor EOS'}"


def _of_chats(intake: Intake, renderer: ChatRenderer, seen: Seen) -> Iterator[Fact]:
    template, settings = renderer.template, intake.settings
    digest = hashlib.sha256(template.text.encode()).hexdigest()[:12]
    options = ""
    if template.options:
        options = f", with {', '.join(f'{k}={v!r}' for k, v in template.options.items())}"
    yield Fact("template", f"{template.origin} (sha256 {digest}){options}")
    by = "as its {% generation %} marks" if template.marks_generation else "found by rendering"
    prompt = template.generation_prompt or template.missing_header
    yield Fact("answers", f"{by}: behind {prompt!r}, up to {_ends(intake, renderer.ends)}")
    opening = _opening(template)
    system = "of the data" if seen.with_system else "none in the data"
    if settings.system_prompt is not None:
        system += f", else --corpus.system_prompt {settings.system_prompt[:60]!r}"
    yield Fact(
        "system",
        f"{system} ({number_of(seen.with_system, 'chat')}); a chat without begins {opening!r}",
    )
    variables = template_variables(template.text) or []
    switches = [name for name in _THINKING if name in variables]
    how = f"; the template has {', '.join(switches)} (template_options)" if switches else ""
    yield Fact(
        "thinking",
        f"{number_of(seen.with_reasoning, 'chat')} with reasoning, corpus.reasoning "
        f"{settings.reasoning}{how}",
    )
    if seen.with_tools or seen.with_calls or "tools" in variables:
        knows = "has" if "tools" in variables else "has no"
        yield Fact(
            "tools",
            f"{number_of(seen.with_tools, 'chat')} with tools, {seen.with_calls} with calls; the "
            f"template {knows} variable tools",
        )


def _ends(intake: Intake, ends: Sequence[str]) -> str:
    if not ends:
        return "the end of the text: nothing ends a turn"
    return " or ".join(f"{end!r} ({intake.tokenizer.convert_tokens_to_ids(end)})" for end in ends)


def _opening(template: ChatTemplate) -> str:
    """Return what the template puts before the first question."""
    text = template.render_or_empty([{"role": "user", "content": _PROBE}], None)
    opening = text.partition(_PROBE)[0] if _PROBE in text else ""
    return opening if len(opening) <= 160 else f"{opening[:157]}..."


def _documents(intake: Intake) -> str:
    def named(token: int | None) -> str:
        return "nothing" if token is None else repr(intake.tokenizer.convert_ids_to_tokens(token))

    return f"begin with {named(intake.ends.bos)}, end with {named(intake.ends.eos)}"


def _supervised(intake: Intake) -> str:
    settings = intake.settings
    if isinstance(intake, PromptIntake):
        return "nothing yet: what the teacher will write"
    if intake.renderer is None:
        return "all of the text, but for its first token"
    if settings.loss_on == "all":
        return "all tokens, but for the first (corpus.loss_on all)"
    empty = "with" if settings.supervise_empty else "without"
    return (
        f"what the assistant says, with the token that ends its turn, {empty} empty answers; "
        "plain documents whole"
    )


def _length(intake: Intake) -> str:
    settings = intake.settings
    if isinstance(intake, PromptIntake):
        room = settings.longest - intake.limits.max_tokens
        what = "leaves the row out" if settings.overlong == "drop" else "cuts off its beginning"
        return (
            f"prompts of up to {intake.limits.max_tokens} tokens and responses of up to {room} "
            f"(max_length {settings.longest}); of a longer prompt, overlong {settings.overlong} "
            f"{what}; of a document, the prompt is the first {intake.limits.document_tokens} tokens"
        )
    what = {
        "truncate": "cuts off the end", "split": "makes several sequences", "drop": "leaves it out"
    }[settings.overlong]  # fmt: skip
    return f"max_length {settings.longest}; of a longer row, overlong {settings.overlong} {what}"


def _heldout(intake: Intake) -> str:
    rule = intake.rule
    if rule.is_off:
        return "nothing"
    most = "" if rule.at_most is None else f", at most {rule.at_most}"
    return f"{rule.fraction:.3g} of the rows by their hash{most} (seed {rule.seed})"


def _bad_rows(intake: Intake) -> str:
    settings = intake.settings
    if settings.on_bad_row == "refuse":
        return "any stops the run (corpus.on_bad_row refuse)"
    return (
        f"are quarantined; more than {settings.max_quarantined_fraction:.3g} of all (and more than "
        "10) stop the run"
    )
