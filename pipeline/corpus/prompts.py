"""The prompts that a teacher answers: samples of the rows of a corpus, none of them supervised."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.chat.conversation import Conversation
from pipeline.corpus.chat.rendering.render import ChatRenderer, Rendered
from pipeline.corpus.conclusion import conclude_rows
from pipeline.corpus.intake import AcceptedRow, Intake
from pipeline.corpus.prepared.blocks import TokenisedRow
from pipeline.corpus.prepared.summary import CorpusSummary, SampleTotals
from pipeline.corpus.sample import CorpusCounts
from pipeline.corpus.sources.rows import Row
from pipeline.corpus.split import prompt_id
from pipeline.errors import CorpusError

__all__ = ["PromptIntake", "PromptLimits", "conclude_prompts"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """How long prompts are."""

    document_tokens: int
    """How many of a document's first tokens are the prompt, its BOS included."""
    max_tokens: int
    """Of a prompt. `overlong` decides about a longer one: `truncate` keeps its last tokens, where
    the question and the generation prompt are; `drop` leaves it out."""


@dataclass(slots=True)
class PromptIntake(Intake):
    """Reads units for their prompts: samples of which no token is supervised.

    The prompt of a chat is the messages before its last assistant turn, whose text is not used,
    followed by the template's generation prompt. A chat that ends with another role is used in
    full. The prompt of a plain document is its first tokens.
    """

    limits: PromptLimits = field(kw_only=True)

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

    def identity(self) -> dict[str, Any]:
        """Return what determines the prompts."""
        # Not `super()`: a dataclass with slots is another class than the one its methods know.
        return Intake.identity(self) | {"prompts": asdict(self.limits)}

    def samples_of(self, taken: AcceptedRow) -> list[TokenisedRow]:
        """Return the prompt of a row."""
        ids = taken.tokens.input_ids
        if taken.is_document:
            ids = ids[: self.limits.document_tokens]
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
        surplus = len(ids) - self.limits.max_tokens
        if surplus <= 0:
            return ids
        if self.settings.overlong == "drop":
            self.count("dropped_overlong")
            return None
        self.count("truncated_rows")
        self.count("truncated_tokens", surplus)
        return ids[surplus:]


def conclude_prompts(
    found: CorpusSummary, intake: PromptIntake, *, only_heldout: bool = False
) -> CorpusCounts:
    """Report what all units say together; return the counts of the prompts.

    Args:
        found: by all units.
        intake: how the corpus was read.
        only_heldout: the held-out prompts are answered, and no others.

    Raises:
        CorpusError: the corpus is empty, has too many bad rows, or no prompt to train on.
    """
    conclude_rows(found, intake)
    if only_heldout:
        found = replace(found, train=SampleTotals())
    counts, settings = found.counts(), intake.settings
    name = settings.dataset_name
    losses = (
        f"{counts.dropped_no_labels} without anything to answer, "
        f"{counts.dropped_overlong} longer than {intake.limits.max_tokens} tokens"
    )
    if only_heldout and not counts.heldout:
        raise CorpusError(
            f"{name}: none of its {counts.rows} rows gave a prompt that is held out ({losses})",
            expected="held-out prompts, which generate.prompts heldout answers alone",
            do="check --corpus.heldout_fraction, or answer --generate.prompts all",
        )
    if not counts.train and not only_heldout:
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
            counts.truncated_rows, intake.limits.max_tokens, counts.truncated_tokens,
        )  # fmt: skip
    if counts.dropped_no_labels or counts.dropped_overlong:
        _log.warning("prompts left out: %s", losses)
    if not counts.heldout:
        _log.warning("no prompt is held out: nothing to evaluate on")
    return counts
