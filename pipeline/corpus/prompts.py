"""Build the prompts that a teacher answers, from the rows and the split of a corpus."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.build import Progress, read_whole
from pipeline.corpus.chat.conversation import Conversation
from pipeline.corpus.chat.rendering.render import ChatRenderer, Rendered
from pipeline.corpus.conclusion import conclude_rows
from pipeline.corpus.intake import AcceptedRow, Intake, TeacherTokens
from pipeline.corpus.prepared.blocks import TokenisedRow
from pipeline.corpus.prepared.summary import CorpusSummary
from pipeline.corpus.reading import open_reading
from pipeline.corpus.sample import CorpusCounts, SplitName
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources.rows import Row
from pipeline.corpus.split import prompt_id
from pipeline.errors import CorpusError

__all__ = ["Prompt", "PromptIntake", "Prompts", "build_prompts"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for the teacher."""

    prompt_id: str
    """32 hexadecimal digits: a hash of the source and the row's place in it."""
    split: SplitName
    """The split of the row, and so of all its responses."""
    input_ids: NDArray[np.int32]
    """At least one token."""
    source_index: int
    """The row's number among the rows read, from 0."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """All prompts of a corpus in source order."""

    prompts: list[Prompt]
    counts: CorpusCounts
    """Counts of the prompts: each is a sample, none of whose tokens is supervised yet."""
    end_of_turn: int | None
    """The token with which the chat template ends an answer, if it has one."""
    identity: dict[str, Any]
    """As JSON; equal for equal prompts, except that the caller adds the tokenizer."""


def build_prompts(
    settings: CorpusSettings,
    *,
    tokenizer: Any,
    seed: int,
    teacher: TeacherTokens | None = None,
    document_tokens: int,
    max_tokens: int,
    progress: Progress | None = None,
) -> Prompts:
    """Read, render and tokenise the prompts of the corpus that `settings` describe.

    The prompt of a chat is the messages before its last assistant turn, whose text is not used,
    followed by the template's generation prompt. A chat that ends with another role is used in
    full. The prompt of a plain document is its first tokens.

    Args:
        settings: the corpus section of the configuration.
        tokenizer: a fast tokenizer of transformers.
        seed: decides, with each row's identity, which rows are held out.
        teacher: the size of its embedding, where it is known.
        document_tokens: how many of a document's first tokens are the prompt, its BOS included.
        max_tokens: of a prompt. `overlong` decides about a longer one: `truncate` keeps its last
            tokens, where the question and the generation prompt are; `drop` leaves it out.
        progress: called after each batch of rows.

    Raises:
        CorpusError: the corpus cannot be reached or read, gives no prompt, or fits no format.
    """
    reading = open_reading(settings, answered=False)
    intake = PromptIntake(
        settings, tokenizer, reading, seed, teacher or TeacherTokens(),
        # No EOS: the prompt is the beginning of a document, which the teacher continues.
        add_eos=False,
        document_tokens=document_tokens, max_tokens=max_tokens,
    )  # fmt: skip
    samples, found = read_whole(intake, progress)
    prompts = [
        Prompt(sample.sample_id, sample.split, sample.input_ids.copy(), sample.source_index)
        for sample in samples
    ]
    counts = _conclude(found, intake)
    identity = intake.identity()
    identity["content"] |= {"prompts_blake2b": found.report.content}
    return Prompts(prompts, counts, intake.end_of_turn(), identity)


@dataclass(slots=True)
class PromptIntake(Intake):
    """Reads units for their prompts: samples of which no token is supervised."""

    document_tokens: int = 0
    max_tokens: int = 0

    def used(self, conversation: Conversation) -> Conversation:
        """Return the conversation without its last assistant turn, if it ends with one.

        A turn may be several messages: an answer in two parts, or a tool call and text.
        """
        messages = list(conversation.messages)
        if not conversation.unfinished:
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
        return replace(
            conversation,
            messages=messages,
            first_supervised=0,
            unsupervised=frozenset(),
            answer_prefix="",
        )

    def described(self, conversation: Conversation) -> list[Any]:
        """Return everything that decides its tokens."""
        chat = conversation
        return [chat.messages, chat.tools, sorted(chat.developer), chat.unfinished]

    def rendered(self, renderer: ChatRenderer, conversation: Conversation, row: Row) -> Rendered:
        """Render it up to the answer."""
        return renderer.render_prompt(conversation, row.place)

    def samples_of(self, taken: AcceptedRow) -> list[TokenisedRow]:
        """Return the prompt of a row."""
        ids = taken.tokens.input_ids
        if taken.is_document:
            ids = ids[: self.document_tokens]
        if not len(ids):
            self.count("dropped_no_labels")
            return []
        fitting = self._fit(ids)
        if fitting is None:
            return []
        name = prompt_id(self.reading.source.name, taken.row.key)
        return [TokenisedRow(name, taken.index, 0, fitting, np.zeros(fitting.shape, np.bool_))]

    def end_of_turn(self) -> int | None:
        """Return the token with which the chat template ends an answer, if it has one."""
        token = None if self.renderer is None else self.renderer.template.end_of_turn()
        return None if token is None else int(self.tokenizer.convert_tokens_to_ids(token))

    def _fit(self, ids: NDArray[np.int32]) -> NDArray[np.int32] | None:
        surplus = len(ids) - self.max_tokens
        if surplus <= 0:
            return ids
        if self.settings.overlong == "drop":
            self.count("dropped_overlong")
            return None
        self.count("truncated_rows")
        self.count("tokens_cut", surplus)
        return ids[surplus:]


def _conclude(found: CorpusSummary, intake: PromptIntake) -> CorpusCounts:
    """Log the counts and return them."""
    conclude_rows(found, intake)
    counts, settings = found.counts(), intake.settings
    name = settings.dataset_name
    losses = (
        f"{counts.dropped_no_labels} without anything to answer, "
        f"{counts.dropped_overlong} longer than {intake.max_tokens} tokens"
    )
    if not counts.train:
        held = f"all of its {counts.samples} prompts are held out" if counts.samples else ""
        raise CorpusError(
            f"{name}: {held or f'none of its {counts.rows} rows gave a prompt'} ({losses})",
            expected="prompts to train on",
            do="check --corpus.format, --corpus.heldout_fraction, --max_length and "
            "--generate.max_new_tokens" + found.report.bad.besides(),
        )
    _log.info(
        "prompts from %s: %d rows -> %d prompts (%d train, %d held out), %d tokens",
        name, counts.rows, counts.samples, counts.train, counts.heldout, counts.tokens,
    )  # fmt: skip
    if counts.truncated_rows:
        _log.warning(
            "%d prompts were longer than %d tokens: the last ones are kept, %d cut off before",
            counts.truncated_rows, intake.max_tokens, counts.tokens_cut,
        )  # fmt: skip
    if counts.dropped_no_labels or counts.dropped_overlong:
        _log.warning("prompts left out: %s", losses)
    if not counts.heldout:
        _log.warning("no prompt is held out: nothing to evaluate on")
    return counts
