"""The chat template: its source, its rendering, and which characters are supervised."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.corpus.chat.conversation import Conversation, Message
from pipeline.errors import CorpusError

__all__ = ["TEMPLATE_DATE", "ChatTemplate", "Rendered", "TemplateRefusal", "load_template"]

TEMPLATE_DATE = "2024-07-26"
"""The date that templates see as today, so that a corpus gives the same tokens on any day."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Letters only, so that no template treats it as markup; no text contains it by accident.
_PROBE = "QxProbeZjWvKq"


class TemplateRefusal(Exception):
    """The template raised an error for one conversation."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, with the supervised character ranges."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template together with the tokenizer that renders it."""

    text: str
    tokenizer: Any
    special_tokens: tuple[str, ...]

    def render(self, conversation: Conversation, *, place: str, everything: bool) -> Rendered:
        """Render without a generation prompt and find the assistant's turns.

        A turn extends from the end of its header to the end of its end-of-turn token. White space
        that the template puts after that token is not part of it, since no model generates it.

        Args:
            conversation: at least one message.
            place: the row's name in messages.
            everything: whether all characters are supervised, whatever the role.

        Raises:
            TemplateRefusal: the template rejects this conversation.
            CorpusError: the assistant's turns cannot be located in what the template renders.
        """
        messages, tools = conversation.messages, conversation.tools
        supervised = [
            number
            for number, message in enumerate(messages)
            if message["role"] == "assistant" and number >= conversation.first_supervised
        ]
        if not everything and supervised and _GENERATION.search(self.text):
            return self._render_marked(conversation, supervised)
        text = self._apply(messages, tools)
        if everything:
            return Rendered(text, [(0, len(text))])
        spans = []
        for number in supervised:
            start = self._start_of(number, text, messages, tools)
            end = self._end_of(number, text, messages, tools)
            if start is None or end is None or end < start:
                raise CorpusError(
                    f"{place}: the assistant's message {number + 1} cannot be found in what the "
                    "chat template renders",
                    expected="a template that renders earlier messages the same whatever follows, "
                    "or one that marks the assistant's text with {% generation %}",
                    do="give such a template in --chat_template, or set --corpus.loss_on all",
                )
            spans.append((start, self._without_trailing_space(text, start, end)))
        return Rendered(text, spans)

    def render_prompt(self, conversation: Conversation) -> str:
        """Render with the generation prompt, so that the next token is the assistant's first.

        Raises:
            TemplateRefusal: the template rejects this conversation.
            CorpusError: the template has a mistake.
        """
        return self._apply(conversation.messages, conversation.tools, prompt=True)

    def end_of_turn(self) -> str | None:
        """Return the special token with which the template ends an assistant's turn.

        A base model's generation config often names only the end-of-text token; a teacher that
        answers in this template ends a turn with the template's token.
        """
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
        closing = self._probe(1, messages, None).partition(_PROBE)[2].lstrip()
        fitting = [token for token in self.special_tokens if closing.startswith(token)]
        return max(fitting, key=len, default=None)

    def _apply(
        self, messages: list[Message], tools: list[Any] | None, *, prompt: bool = False
    ) -> str:
        with _Refusals():
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.text,
                add_generation_prompt=prompt,
                tokenize=False,
                strftime_now=_fixed_date,
            )
        return str(text)

    def _render_marked(self, conversation: Conversation, supervised: list[int]) -> Rendered:
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        messages = conversation.messages
        with _Refusals():
            texts, marked = render(
                conversations=[messages],
                tools=conversation.tools,
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
                strftime_now=_fixed_date,
                **self.tokenizer.special_tokens_map,
            )
        spans = [(int(start), int(end)) for start, end in marked[0]]
        speakers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) == len(speakers):
            spans = [span for span, n in zip(spans, speakers, strict=True) if n in set(supervised)]
        return Rendered(str(texts[0]), spans)

    def _start_of(
        self, number: int, text: str, messages: list[Message], tools: list[Any] | None
    ) -> int | None:
        if number > 0:
            head = self._quietly(messages[:number], tools, prompt=True)
            if head and text.startswith(head):
                return len(head)
        probed = self._probe(number, messages, tools)
        at = probed.find(_PROBE)
        return at if at >= 0 and probed[:at] == text[:at] else None

    def _end_of(
        self, number: int, text: str, messages: list[Message], tools: list[Any] | None
    ) -> int | None:
        if number == len(messages) - 1:
            return len(text)
        upto = self._quietly(messages[: number + 1], tools)
        if upto and text.startswith(upto):
            return len(upto)
        # Some templates (Qwen 3) render the last turn differently from the earlier ones. The end
        # of a turn is the same: find it after a probe in place of the answer.
        closing = self._probe(number, messages[: number + 1], tools).partition(_PROBE)[2]
        rest = self._probe(number, messages, tools).partition(_PROBE)[2]
        if closing and rest.startswith(closing) and text.endswith(rest):
            return len(text) - len(rest) + len(closing)
        return None

    def _probe(self, number: int, messages: list[Message], tools: list[Any] | None) -> str:
        probed = [*messages]
        probed[number] = {**messages[number], "content": _PROBE}
        return self._quietly(probed, tools)

    def _quietly(
        self, messages: list[Message], tools: list[Any] | None, *, prompt: bool = False
    ) -> str:
        try:
            return self._apply(messages, tools, prompt=prompt)
        except TemplateRefusal:
            return ""

    def _without_trailing_space(self, text: str, start: int, end: int) -> int:
        trimmed = text[start:end].rstrip()
        return start + len(trimmed) if trimmed.endswith(self.special_tokens) else end


def load_template(tokenizer: Any, given: str | None) -> ChatTemplate:
    """Return the template of the settings (a file or its text), or the tokenizer's.

    Raises:
        CorpusError: there is none, or the file cannot be read.
    """
    text = _given_text(given) if given is not None else _own_text(tokenizer)
    special = tuple(sorted(str(token) for token in tokenizer.get_added_vocab()))
    return ChatTemplate(
        text=text,
        tokenizer=tokenizer,
        special_tokens=special or tuple(tokenizer.all_special_tokens),
    )


def _given_text(given: str) -> str:
    if "{" in given:
        return given
    path = Path(given).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CorpusError(
            f"the chat template {given} cannot be read ({reason})",
            expected="a .jinja file, or the text of a template",
            do="check --chat_template",
        ) from None


def _own_text(tokenizer: Any) -> str:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not own:
        raise CorpusError(
            "the corpus holds chats, but the tokenizer has no chat template",
            expected="a template that turns roles into text",
            do="give --chat_template, or use plain text",
        )
    return str(own)


def _fixed_date(pattern: str) -> str:
    return datetime.date.fromisoformat(TEMPLATE_DATE).strftime(pattern)


class _Refusals:
    """Turns a template's errors into `TemplateRefusal`, and syntax errors into `CorpusError`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        import jinja2

        if isinstance(error, jinja2.TemplateSyntaxError):
            raise CorpusError(
                f"the chat template has a mistake in line {error.lineno} ({error.message})",
                expected="a Jinja template",
                do="check --chat_template",
            ) from None
        if isinstance(error, (jinja2.TemplateError, TypeError, ValueError, KeyError)):
            raise TemplateRefusal(str(error) or type(error).__name__) from error
