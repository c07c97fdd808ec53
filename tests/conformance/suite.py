"""Which cases there are: of containers, of tokenizers, and of the settings that matter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from tests.conformance.chats import CHATS, Chat
from tests.conformance.containers import CONTAINERS
from tests.conformance.expected import expected
from tests.conformance.templates import Template
from tests.conformance.trying import Case, try_chats

__all__ = [
    "FEW_CHATS", "SHORT_CHATS", "container_cases", "empty_cases", "named", "reasoning_cases",
    "tokenizer_cases",
]  # fmt: skip


def named(*names: str) -> list[Chat]:
    """Return the chats of these names."""
    by_name = {chat.name: chat for chat in CHATS}
    return [by_name[name] for name in names]


SHORT_CHATS = [chat for chat in CHATS if chat.name not in ("long", "long_question", "fifty_turns")]
FEW_CHATS = named(
    "system_first_multi", "combining_first", "joined_emoji", "scripts", "code", "spaces_around",
    "newlines_around_earlier", "header_words", "looks_like_header_multi", "markup",
    "null_content", "calls_in_a_row", "reasoning", "pair_continued", "prefix",
)  # fmt: skip
"""For the tokenizers: those whose letters, spaces and seams are hard."""


def container_cases(
    template: Template,
    *,
    containers: Iterable[str] = tuple(CONTAINERS),
    chats: Sequence[Chat] = CHATS,
) -> Iterator[Case]:
    """Try chats out of containers: the text as expected, the tokens as out of JSON Lines."""
    lines = try_chats(chats, template)
    tokens = {case.chat: case.tokens for case in lines}
    for container in containers:
        if container == "jsonl":
            yield from lines
            continue
        for case in try_chats(chats, template, container):
            theirs = tokens[case.chat]
            if case.right and case.tokens is not None and theirs is not None:
                same = all(map(np.array_equal, case.tokens, theirs))
                found = case.found if same else "the text, but other tokens than out of JSON Lines"
                case = replace(case, found=found, right=same)
            yield case


def tokenizer_cases(template: Template, kind: str, chats: Sequence[Chat] = FEW_CHATS) -> list[Case]:
    """Try chats with another tokenizer than the byte-level one."""
    return try_chats(chats, template, kind=kind)


def reasoning_cases(template: Template, reasoning: Literal["template", "drop"]) -> list[Case]:
    """Try the chats with reasoning where the settings leave it to the template or drop it."""
    chats = [chat for chat in CHATS if any(turn.reasoning for turn in chat.turns)]
    # Is an answer empty whose reasoning the template leaves out? Nothing says so.
    if reasoning == "template":
        chats = [chat for chat in chats if not chat.name.startswith("reasoning_only")]
    expect = partial(expected, reasoning=reasoning)
    cases = try_chats(chats, template, expect=expect, reasoning=reasoning)
    return [replace(case, container=f"jsonl, reasoning {reasoning}") for case in cases]


def empty_cases(template: Template) -> list[Case]:
    """Try the chats with empty answers and thoughts where the settings supervise them."""
    chats = named(
        "plain", "multi_turn", "null_content", "empty_content", "last_is_empty", "last_is_null",
        "only_empty", "only_null",
    )  # fmt: skip
    expect = partial(expected, supervise_empty=True)
    cases = try_chats(chats, template, expect=expect, supervise_empty=True)
    return [replace(case, container="jsonl, supervise_empty") for case in cases]
