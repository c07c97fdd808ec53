"""Tries chats: builds a corpus of them and compares what is supervised with what is expected."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.intake import TeacherTokens
from pipeline.corpus.sample import Sample
from pipeline.corpus.settings import CorpusSettings
from tests.conformance.chats import CHATS, Chat
from tests.conformance.containers import groups, write
from tests.conformance.expected import NO_SAMPLE, QUARANTINED, expected
from tests.conformance.templates import Template
from tests.conformance.vocabularies import comparable, holds, tokenizer_of
from tests.whole_corpus import build_corpus

__all__ = ["Case", "Settings", "build", "supervised", "try_chats", "wrong"]

Settings = dict[str, Any]
Tokens = tuple[NDArray[np.int32], NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Case:
    """One chat under one template out of one container."""

    chat: str
    template: str
    container: str
    found: str
    expected: str
    right: bool
    tokens: Tokens | None = None
    """Of its sample, if it gave one."""

    def __str__(self) -> str:
        """Say what is wrong, on one line."""
        found, wanted = _around_difference(self.found, self.expected)
        where = f"{self.chat}, {self.template}, {self.container}"
        return f"{where}: found {found}, expected {wanted}"


def build(path: Path, template: Template, kind: str = "bytes", **settings: Any) -> Any:
    """Build the corpus of a file; nothing is held out, cut or stopped for its bad rows."""
    chosen = CorpusSettings(
        dataset_name=str(path), heldout_fraction=0.0, max_length=200_000,
        max_quarantined_fraction=1.0, **settings,
    )  # fmt: skip
    tokenizer = tokenizer_of(kind, template)
    ends = tuple(int(tokenizer.convert_tokens_to_ids(token)) for token in template.end_tokens)
    return build_corpus(chosen, tokenizer=tokenizer, seed=1, teacher=TeacherTokens(ends))


def supervised(sample: Sample, template: Template, kind: str = "bytes") -> str:
    """Decode the supervised tokens of a sample."""
    ids = sample.input_ids[sample.loss_mask].tolist()
    tokenizer = tokenizer_of(kind, template)
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def try_chats(
    chats: Sequence[Chat],
    template: Template,
    container: str = "jsonl",
    *,
    kind: str = "bytes",
    expect: Callable[[Chat, Template], str] = expected,
    **settings: Any,
) -> list[Case]:
    """Try chats under a template, all that fit into one file in one corpus."""
    wanted = {chat.name: expect(chat, template) for chat in chats}
    fitting = [chat for chat in chats if holds(kind, wanted[chat.name])]
    cases = []
    folder = Path(tempfile.mkdtemp(prefix="conformance-"))
    try:
        for number, group in enumerate(groups(fitting, container)):
            attempt = _Attempt(template, container, kind, settings, folder / str(number))
            cases += attempt.cases(group, wanted)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return cases


def wrong(cases: Sequence[Case]) -> list[str]:
    """Return the cases that are wrong, in words."""
    return [str(case) for case in cases if not case.right]


class _Attempt:
    """The chats of one file."""

    def __init__(
        self, template: Template, container: str, kind: str, settings: Settings, folder: Path
    ) -> None:
        self.template, self.container, self.kind = template, container, kind
        self.settings, self.folder = settings, folder
        self.numbers = itertools.count()

    def cases(self, group: list[Chat], wanted: dict[str, str]) -> list[Case]:
        """Try them together; where that fails, each beside a good one."""
        try:
            samples, quarantined = self._read(group)
        except Exception:
            return [self._case(chat, *self._alone(chat), wanted[chat.name]) for chat in group]
        # Which rows are in quarantine only their number tells.
        trusted = quarantined == sum(wanted[chat.name] == QUARANTINED for chat in group)
        cases = []
        for chat in group:
            sample, expect = samples.get(chat.name), wanted[chat.name]
            found: tuple[str, Tokens | None]
            if sample is not None:
                found = self._of(sample)
            elif trusted and expect in (QUARANTINED, NO_SAMPLE):
                found = expect, None
            else:
                found = self._alone(chat)
            cases.append(self._case(chat, *found, expect))
        return cases

    def _read(self, group: list[Chat]) -> tuple[dict[str, Sample], int]:
        # The good row stands first: it also tells the format.
        rows = [_good(group[0]), *group]
        path = write(
            [chat.row for chat in rows], self.container, self.folder / str(next(self.numbers))
        )
        corpus = build(path, self.template, self.kind, **self.settings)
        names = {number: chat.name for number, chat in enumerate(rows) if number}
        samples = {
            names[sample.source_index]: sample for sample in corpus.samples if sample.source_index
        }
        return samples, int(getattr(corpus.counts, "quarantined", 0))

    def _alone(self, chat: Chat) -> tuple[str, Tokens | None]:
        try:
            samples, quarantined = self._read([chat])
        except Exception as error:
            return f"({type(error).__name__}: {error})", None
        if chat.name in samples:
            return self._of(samples[chat.name])
        return QUARANTINED if quarantined else NO_SAMPLE, None

    def _of(self, sample: Sample) -> tuple[str, Tokens]:
        text = supervised(sample, self.template, self.kind)
        return text, (sample.input_ids, sample.loss_mask)

    def _case(self, chat: Chat, found: str, tokens: Tokens | None, expect: str) -> Case:
        right = comparable(self.kind, found) == comparable(self.kind, expect)
        where = self.container if self.kind == "bytes" else f"{self.container} ({self.kind})"
        return Case(chat.name, self.template.name, where, found, expect, right, tokens)


_GOOD = {
    (chat.format, chat.arrow): chat
    for name in (
        "plain", "call_arguments_text", "text_part", "text_part_list", "sharegpt", "pair_texts",
        "pair_lists", "pair_list_and_text", "instruction",
    )
    for chat in CHATS
    if chat.name == name
}  # fmt: skip
_GOOD["messages", "strings"] = _GOOD["messages", "plain"]


def _good(chat: Chat) -> Chat:
    """Return a chat of the same schema that every template renders."""
    return _GOOD.get((chat.format, chat.arrow)) or next(
        good for (form, _), good in _GOOD.items() if form == chat.format
    )


def _around_difference(found: str, wanted: str) -> tuple[str, str]:
    if max(len(found), len(wanted)) <= 200:
        return repr(found), repr(wanted)
    same = next(
        (n for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b),
        min(len(found), len(wanted)),
    )
    begin = max(0, same - 60)
    return tuple(  # type: ignore[return-value]
        f"[{len(text)} letters, from {begin}] {text[begin : same + 100]!r}"
        for text in (found, wanted)
    )
