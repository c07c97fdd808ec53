"""The forms of a chat that templates take: tool calls, roles and reasoning as each expects them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator

from pipeline.corpus.chat.content import REASONING_KEYS
from pipeline.corpus.chat.conversation import Conversation, Message
from pipeline.corpus.chat.rendering.template import ChatTemplate
from pipeline.corpus.settings import Reasoning

__all__ = ["forms", "is_empty_answer"]

_INLINE_THOUGHT = re.compile(r"\s*<think>(?P<thought>.*?)</think>", re.DOTALL)


def forms(
    conversation: Conversation, template: ChatTemplate, reasoning: Reasoning
) -> Iterator[tuple[list[Message], list[Message]]]:
    """Yield the messages in the forms that templates take, the likeliest first.

    Returns:
        The messages to render, and the same with the reasoning apart from the content where that is
        how the template treats it: what stands where is found by these.
    """
    given = conversation.messages
    if reasoning == "drop":
        given = [_without_reasoning(message) for message in given]
    readings = [given]
    if any(_has_inline_thought(message) for message in given):
        readings += [
            [_with_reasoning_apart(message, strip=strip) for message in given]
            for strip in (False, True)
        ]
    roles = [False, True] if conversation.developer else [False]
    calls = any(message.get("tool_calls") for message in given)
    for developer, reading in itertools.product(roles, readings):
        for call_form in template.call_forms if calls else (None,):
            change = _former(template, conversation.developer if developer else (), call_form)
            yield change(given), change(reading)


def _former(
    template: ChatTemplate, developer: Collection[int], call_form: tuple[bool, bool] | None
) -> Callable[[list[Message]], list[Message]]:
    """Return the function that brings canonical messages into one form."""

    def change(messages: list[Message]) -> list[Message]:
        if any("reasoning_content" in message for message in messages):
            messages = [_renamed(message, template.reasoning_key) for message in messages]
        if developer:
            messages = [
                {**message, "role": "developer"} if number in developer else message
                for number, message in enumerate(messages)
            ]
        if call_form is not None:
            as_text, flat = call_form
            messages = [_with_calls(m, as_text=as_text, flat=flat) for m in messages]
        return messages

    return change


def is_empty_answer(message: Message) -> bool:
    """Return whether a message of the assistant has no content, no reasoning and no call."""
    texts = (message.get(key) for key in ("content", *REASONING_KEYS))
    return not message.get("tool_calls") and not any((text or "").strip() for text in texts)


def _without_reasoning(message: Message) -> Message:
    """Return a message without its reasoning, in a key of its own or at the content's beginning."""
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    if _has_inline_thought(message):
        kept["content"] = _INLINE_THOUGHT.sub("", message["content"], count=1).lstrip()
    return kept


def _has_inline_thought(message: Message) -> bool:
    content = message.get("content")
    return (
        message["role"] == "assistant"
        and isinstance(content, str)
        and "</think>" in content
        and _INLINE_THOUGHT.match(content) is not None
    )


def _with_reasoning_apart(message: Message, *, strip: bool) -> Message:
    if not _has_inline_thought(message) or "reasoning_content" in message:
        return message
    match = _INLINE_THOUGHT.match(message["content"])
    assert match is not None
    content, thought = message["content"][match.end() :], match["thought"]
    if strip:
        content, thought = content.lstrip(), thought.strip()
    return {**message, "content": content, "reasoning_content": thought}


def _renamed(message: Message, key: str) -> Message:
    if key == "reasoning_content":
        return message
    return {key if k == "reasoning_content" else k: value for k, value in message.items()}


def _with_calls(message: Message, *, as_text: bool, flat: bool) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    formed = []
    for call in calls:
        function = dict(call["function"])
        if as_text:
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        rest = {key: value for key, value in call.items() if key not in ("type", "function")}
        formed.append({**rest, **function} if flat else {**call, "function": function})
    return {**message, "tool_calls": formed}
