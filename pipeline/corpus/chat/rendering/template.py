"""The chat template: its source, its options, its rendering, and what ends a turn in it."""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.corpus.chat.content import REASONING_KEYS
from pipeline.corpus.chat.conversation import Message
from pipeline.errors import CorpusError

__all__ = [
    "TEMPLATE_DATE", "ChatTemplate", "TemplateRefusal", "load_template", "template_variables",
]  # fmt: skip

TEMPLATE_DATE = "2024-07-26"
"""The date that templates see as today, so that a corpus gives the same tokens on any day."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Upper-case letters only, so that no template treats it as markup.
_PROBE = "QXPROBEZJWVKQ"
_RESERVED = (
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages",
    "return_assistant_tokens_mask", "strftime_now", "tokenize",
)  # fmt: skip


class TemplateRefusal(Exception):
    """The template raised an error for one conversation."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template together with the tokenizer that renders it."""

    text: str
    tokenizer: Any
    special_tokens: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further variables for the template; `tools` is for chats without tools of their own."""
    origin: str = ""
    """Where its text is from, in words."""

    @property
    def marks_generation(self) -> bool:
        """Whether the template marks the assistant's text with {% generation %}."""
        return bool(_GENERATION.search(self.text))

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None, *, prompt: bool = False
    ) -> str:
        """Return the text of a chat, with the generation prompt at its end if asked.

        Raises:
            TemplateRefusal: the template rejects this conversation.
            CorpusError: the template has a mistake.
        """
        with _Refusals():
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.text,
                add_generation_prompt=prompt,
                tokenize=False,
                strftime_now=_fixed_date,
                **self._variables(tools),
            )
        return str(text)

    def render_or_empty(
        self, messages: Sequence[Message], tools: list[Any] | None, *, prompt: bool = False
    ) -> str:
        """Return what `render` returns, or an empty text where the template rejects the chat."""
        try:
            return self.render(messages, tools, prompt=prompt)
        except TemplateRefusal:
            return ""

    def render_generation(
        self, messages: Sequence[Message], tools: list[Any] | None
    ) -> list[tuple[int, int]]:
        """Return the character ranges of what {% generation %} marks in the text of `render`.

        Raises:
            TemplateRefusal: the template rejects this conversation.
        """
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        with _Refusals():
            _, marked = render(
                conversations=[list(messages)],
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
                strftime_now=_fixed_date,
                **{**self.tokenizer.special_tokens_map, **self._variables(tools)},
            )
        return [(int(start), int(end)) for start, end in marked[0]]

    def end_of_turn(self) -> str | None:
        """Return the special token with which the template ends the last assistant's turn.

        A base model's generation config often names only the end-of-text token; a teacher that
        answers in this template ends a turn with the template's token.
        """
        return self._special_after(_PROBE, self._chat(("user", "a"), ("assistant", _PROBE)))

    def turn_ends(self, end_tokens: Collection[int]) -> tuple[str, ...]:
        """Return the texts of the tokens that end an assistant's turn, the longest first.

        They are the tokens that end generation, the template's own end of the last turn, and the
        token with which it closes earlier turns if it closes those of the user with it as well (a
        token after the assistant's turns alone may be the header of the next).

        Args:
            end_tokens: ids that end generation; the tokenizer's EOS is among them or not.
        """
        found = {self.tokenizer.convert_ids_to_tokens(int(token)) for token in end_tokens}
        found &= set(self.special_tokens)  # an ordinary token's name is not its text
        found |= {self.tokenizer.eos_token, self.end_of_turn()}
        user, answer = _PROBE + "U", _PROBE + "A"
        chat = self._chat(("user", user), ("assistant", answer), ("user", "a"), ("assistant", "b"))
        closing = self._special_after(answer, chat)
        if closing is not None and closing == self._special_after(user, chat):
            found.add(closing)
        return tuple(sorted((str(text) for text in found if text), key=len, reverse=True))

    @cached_property
    def reasoning_key(self) -> str:
        """The key under which the template looks for an answer's reasoning."""
        for key in REASONING_KEYS:
            messages: list[Message] = [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", key: _PROBE},
            ]
            if _PROBE in self.render_or_empty(messages, None):
                return key
        return REASONING_KEYS[0]

    @cached_property
    def generation_prompt(self) -> str:
        """What the template adds to one question as generation prompt; empty if nothing."""
        user: Message = {"role": "user", "content": _PROBE}
        asked = self.render_or_empty([user], None, prompt=True)
        bare = self.render_or_empty([user], None)
        return asked[len(bare) :] if bare and asked.startswith(bare) else ""

    @cached_property
    def missing_header(self) -> str:
        """What stands before an answer where the template knows no generation prompt."""
        user: Message = {"role": "user", "content": _PROBE}
        asked = self.render_or_empty([user], None, prompt=True)
        answered = self._chat(("user", _PROBE), ("assistant", _PROBE))
        if self.generation_prompt or not asked or not answered.startswith(asked):
            return ""
        header = answered[len(asked) :].partition(_PROBE)[0]
        return header if header.strip() else ""

    @cached_property
    def call_forms(self) -> tuple[tuple[bool, bool], ...]:
        """How the template takes tool calls, the best form first: (as text, flat).

        As text: `arguments` is a JSON text, as in OpenAI's API; else a mapping. Flat: `name` and
        `arguments` stand in the call itself, not in its `function`. A form whose arguments come
        out encoded twice or as Python's `repr` is used only if there is no other.
        """
        forms = [(as_text, flat) for flat in (False, True) for as_text in (False, True)]
        rated = {form: self._rate_call(*form) for form in forms}
        usable = [form for form in forms if rated[form]]
        return tuple(sorted(usable, key=lambda form: -rated[form])) or ((False, False),)

    def _rate_call(self, as_text: bool, flat: bool) -> int:
        """Return 2 for arguments that are rendered well, 1 for badly, 0 for not at all."""
        import json

        key, value, name = (_PROBE + letter for letter in "KVN")
        arguments: Any = {key: value}
        call: dict[str, Any] = {
            "name": name, "arguments": json.dumps(arguments) if as_text else arguments
        }  # fmt: skip
        # Some templates insist on ids of nine letters and digits.
        call = call if flat else {"type": "function", "id": "a1b2c3d4e", "function": call}
        messages: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [{**call, "id": "a1b2c3d4e"}]},
        ]
        text = self.render_or_empty(messages, None)
        if not all(mark in text for mark in (key, value, name)):
            return 0
        return 1 if f"'{key}'" in text or f'\\"{key}' in text else 2

    def _special_after(self, mark: str, text: str) -> str | None:
        """Return the special token that follows `mark` in a text, after white space."""
        closing = text.partition(mark)[2].lstrip()
        fitting = [token for token in self.special_tokens if closing.startswith(token)]
        return max(fitting, key=len, default=None)

    def _chat(self, *turns: tuple[str, str]) -> str:
        return self.render_or_empty([{"role": r, "content": c} for r, c in turns], None)

    def _variables(self, tools: list[Any] | None) -> dict[str, Any]:
        own = {} if tools is None else {"tools": tools}
        return {"tools": None, **self.options, **own}


def load_template(
    tokenizer: Any, given: str | None, options: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """Return the template of the settings (a file or its text), or the tokenizer's.

    Args:
        tokenizer: renders it.
        given: `corpus.chat_template`; where the tokenizer has several templates, also one's name.
        options: `corpus.template_options`.

    Raises:
        CorpusError: there is none, the file cannot be read, or it has no variable of an option's
            name.
    """
    text, origin = _own_text(tokenizer, given) or "", ""
    if text:
        several = isinstance(tokenizer.chat_template, dict)
        origin = f"the tokenizer's {given or 'default'!r}" if several else "the tokenizer's own"
    elif given is not None:
        text = _given_text(given)
        origin = "the text of --chat_template" if "{" in given else f"--chat_template {given}"
    if not text:
        raise CorpusError(
            "the corpus holds chats, but the tokenizer has no chat template",
            expected="a template that turns roles into text",
            do="give --chat_template, or use plain text",
        )
    special = tuple(sorted(str(token) for token in tokenizer.get_added_vocab()))
    if options:
        _check_options(text, options)
    return ChatTemplate(
        text=text,
        tokenizer=tokenizer,
        special_tokens=special or tuple(tokenizer.all_special_tokens),
        options=dict(options or {}),
        origin=origin,
    )


def template_variables(text: str) -> list[str] | None:
    """Return the variables that a template reads beside its chat; None where it has a mistake."""
    import jinja2
    import jinja2.meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
    try:
        variables = jinja2.meta.find_undeclared_variables(environment.parse(plain))
    except jinja2.TemplateError:  # rendering says what is wrong with it
        return None
    return sorted(variables - set(_RESERVED) - {"raise_exception", "bos_token", "eos_token"})


def _check_options(text: str, options: Mapping[str, Any]) -> None:
    known = template_variables(text)
    if known is None:
        return
    wrong = [name for name in options if name not in known]
    if wrong:
        raise CorpusError(
            f"corpus.template_options: the chat template has no variable {', '.join(wrong)}",
            expected=f"one of {', '.join(known)}" if known else "none, for this template",
            do="check the names, or give another --chat_template",
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


def _own_text(tokenizer: Any, name: str | None) -> str | None:
    """Return the tokenizer's template; of several the one of a name, else `default`.

    Raises:
        CorpusError: there are several without a `default`, and none is named.
    """
    own = tokenizer.chat_template
    if not isinstance(own, dict):
        return None if name is not None or not own else str(own)
    if name is None and "default" not in own and own:
        raise CorpusError(
            "the tokenizer has several chat templates and no default",
            expected=f"one of {', '.join(sorted(own))}",
            do="name it in --chat_template",
        )
    found = own.get(name or "default")
    return None if found is None else str(found)


def _fixed_date(pattern: str) -> str:
    return datetime.date.fromisoformat(TEMPLATE_DATE).strftime(pattern)


class _Refusals:
    """Turns a template's errors into `TemplateRefusal`, and syntax errors into `CorpusError`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception):
            return
        import jinja2

        if isinstance(error, jinja2.TemplateSyntaxError):
            raise CorpusError(
                f"the chat template has a mistake in line {error.lineno} ({error.message})",
                expected="a Jinja template",
                do="check --chat_template",
            ) from None
        # A template is a program: whatever it raises for one chat is that chat's refusal.
        raise TemplateRefusal(str(error) or type(error).__name__) from error
