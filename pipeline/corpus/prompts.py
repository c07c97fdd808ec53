"""Builds the prompts that a teacher is to answer, from the rows and the split of a corpus."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.conversation import Conversation, Document
from pipeline.corpus.formats import Interpreter
from pipeline.corpus.reading import Progress, open_reading, reading_identity, with_system
from pipeline.corpus.rows import Row, RowSource
from pipeline.corpus.sample import CorpusCounts, SplitName
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.split import HeldoutRule, prompt_id
from pipeline.corpus.template import (
    ChatTemplate,
    Rendered,
    TemplateRefusal,
    load_template,
)
from pipeline.corpus.tokenise import document_ends, require_offsets, tokenise
from pipeline.errors import CorpusError

__all__ = ["Prompt", "Prompts", "build_prompts"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the teacher reads before it writes."""

    prompt_id: str
    """32 hexadecimal digits: a hash of the source and the row's place in it."""
    split: SplitName
    """That of the row, and so of all responses to it."""
    input_ids: NDArray[np.int32]
    """At least one token."""
    source_index: int
    """The row's number among the rows read, from 0."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """All prompts of a corpus in source order."""

    prompts: list[Prompt]
    counts: CorpusCounts
    """Of the prompts: each is a sample, and no token counts yet."""
    end_of_turn: int | None
    """The token with which the chat template closes an answer, where it has one."""
    identity: dict[str, Any]
    """JSON-able; equal for equal prompts, except that the tokenizer is the caller's to add."""


def build_prompts(
    settings: CorpusSettings,
    *,
    tokenizer: Any,
    seed: int,
    document_tokens: int,
    max_tokens: int,
    progress: Progress | None = None,
) -> Prompts:
    """Read, render and tokenise the prompts of the corpus that `settings` describe.

    A chat gives the messages before its last assistant turn, whose text is not used, followed by
    the template's generation prompt. A chat that ends with another speaker is asked as it stands.
    A plain document gives its first tokens.

    Args:
        settings: the corpus section of the configuration.
        tokenizer: a fast tokenizer of transformers.
        seed: decides, with each row's identity, which rows are held out.
        document_tokens: how many of a document's first tokens are the prompt, its BOS included.
        max_tokens: of a prompt. `overlong` says what becomes of a longer one: `truncate` keeps its
            last tokens, as the question and the generation prompt stand there; `drop` leaves it
            out.
        progress: called after each batch of rows.

    Raises:
        CorpusError: the corpus cannot be reached or read, gives no prompt, or fits no format.
    """
    require_offsets(tokenizer)
    reading = open_reading(settings, answered=False)
    work = _Work(settings, tokenizer, reading.source, seed, document_tokens, max_tokens)
    for batch in reading.batches:
        work.add(batch, reading.interpret)
        if progress is not None:
            progress(work.rows, reading.total)
    return work.finish(reading.format_name)


def _asked(item: Conversation) -> Conversation:
    """Return the conversation without its last assistant turn, if it ends with one.

    A turn may be several messages: an answer in two parts, a call and what is said beside it.
    """
    messages = list(item.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return Conversation(messages, tools=item.tools)


@dataclass(slots=True)
class _Work:
    settings: CorpusSettings
    tokenizer: Any
    source: RowSource
    seed: int
    document_tokens: int
    max_tokens: int
    rows: int = 0
    prompts: list[Prompt] = field(default_factory=list)
    tally: dict[str, int] = field(default_factory=dict)
    template: ChatTemplate | None = None
    refusal: str = ""
    content: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    rule: HeldoutRule = field(init=False)
    ends: Any = field(init=False)

    def __post_init__(self) -> None:
        chosen = self.settings
        self.rule = HeldoutRule(
            self.seed, self.source.name, chosen.heldout_fraction, chosen.heldout_samples
        )
        # No EOS: a document's prompt is its beginning, and the teacher goes on.
        self.ends = document_ends(self.tokenizer, add_bos=chosen.add_bos, add_eos=False)

    def add(self, batch: list[Row], interpret: Interpreter) -> None:
        """Take the next rows of the source."""
        kept: list[tuple[Row, int, SplitName]] = []
        texts: list[Rendered | str] = []
        for row in batch:
            index, split = self.rows, self.rule.split_of(row.key)
            self.rows += 1
            text = self._render(interpret(row), row)
            if text is not None:
                kept.append((row, index, split))
                texts.append(text)
        done = tokenise(texts, tokenizer=self.tokenizer, ends=self.ends)
        for (row, index, split), text, tokens in zip(kept, texts, done, strict=True):
            ids = tokens.input_ids
            if isinstance(text, str):
                ids = ids[: self.document_tokens]
            if not len(ids):
                self._count("dropped_no_labels")
                continue
            fitting = self._fit(ids)
            if fitting is not None:
                name = prompt_id(self.source.name, row.key)
                self.prompts.append(Prompt(name, split, fitting.copy(), index))

    def _render(self, item: Conversation | Document, row: Row) -> Rendered | str | None:
        if isinstance(item, Document):
            self._digest(row, item.text)
            if item.text.strip():
                return item.text
            self._count("dropped_no_labels")
            return None
        question = _asked(item)
        self._digest(row, [question.messages, question.tools])
        if not question.messages:
            self._count("dropped_no_labels")
            return None
        if self.template is None:
            self.template = load_template(self.tokenizer, self.settings.chat_template)
        try:
            text = self.template.render_prompt(with_system(question, self.settings.system_prompt))
        except TemplateRefusal as refusal:
            self._count("dropped_by_template")
            self.refusal = self.refusal or f"{row.place}: {refusal}"
            return None
        return Rendered(text, [])

    def _fit(self, ids: NDArray[np.int32]) -> NDArray[np.int32] | None:
        surplus = len(ids) - self.max_tokens
        if surplus <= 0:
            return ids
        if self.settings.overlong == "drop":
            self._count("dropped_overlong")
            return None
        self._count("truncated_rows")
        self._count("tokens_cut", surplus)
        return ids[surplus:]

    def _count(self, name: str, by: int = 1) -> None:
        self.tally[name] = self.tally.get(name, 0) + by

    def _digest(self, row: Row, content: object) -> None:
        text = json.dumps([row.key, content], sort_keys=True, default=str)
        self.content.update(text.encode() + b"\n")

    def finish(self, format_name: str) -> Prompts:
        """Count, report and describe what was built."""
        counts = self._counts()
        name = self.settings.dataset_name
        if not counts.train:
            held = f"all of its {counts.samples} prompts are held out" if counts.samples else ""
            raise CorpusError(
                f"{name}: {held or f'none of its {self.rows} rows gave a prompt'}"
                f" ({self._losses(counts)})",
                expected="prompts to train on",
                do="check --corpus.format, --corpus.heldout_fraction, --max_length and "
                "--generate.max_new_tokens",
            )
        self._report(counts)
        return Prompts(self.prompts, counts, self._end_of_turn(), self._identity(format_name))

    def _end_of_turn(self) -> int | None:
        token = self.template.end_of_turn() if self.template else None
        return None if token is None else int(self.tokenizer.convert_tokens_to_ids(token))

    def _counts(self) -> CorpusCounts:
        heldout = sum(prompt.split == "heldout" for prompt in self.prompts)
        names = (
            "truncated_rows", "tokens_cut", "dropped_no_labels", "dropped_overlong",
            "dropped_by_template",
        )  # fmt: skip
        return CorpusCounts(
            rows=self.rows,
            samples=len(self.prompts),
            train=len(self.prompts) - heldout,
            heldout=heldout,
            tokens=sum(len(prompt.input_ids) for prompt in self.prompts),
            counted_tokens=0,
            split_rows=0,
            split_parts=0,
            **{name: self.tally.get(name, 0) for name in names},
        )

    def _losses(self, counts: CorpusCounts) -> str:
        text = (
            f"{counts.dropped_no_labels} without anything to answer, "
            f"{counts.dropped_overlong} longer than {self.max_tokens} tokens, "
            f"{counts.dropped_by_template} refused by the chat template"
        )
        return f"{text}, first {self.refusal}" if self.refusal else text

    def _report(self, counts: CorpusCounts) -> None:
        _log.info(
            "prompts from %s: %d rows -> %d prompts (%d train, %d held out), %d tokens",
            self.settings.dataset_name, counts.rows, counts.samples, counts.train, counts.heldout,
            counts.tokens,
        )  # fmt: skip
        if counts.truncated_rows:
            _log.warning(
                "%d prompts were longer than %d tokens: the last ones are kept, %d cut off before",
                counts.truncated_rows, self.max_tokens, counts.tokens_cut,
            )  # fmt: skip
        if counts.dropped_no_labels or counts.dropped_overlong or counts.dropped_by_template:
            _log.warning("prompts left out: %s", self._losses(counts))
        if not counts.heldout:
            _log.warning("no prompt is held out: nothing to evaluate on")

    def _identity(self, format_name: str) -> dict[str, Any]:
        identity = reading_identity(
            self.settings, self.source, format_name, self.template, self.rule, seed=self.seed
        )
        identity["content"] |= {"prompts_blake2b": self.content.hexdigest()}
        return identity
