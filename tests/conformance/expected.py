"""The supervised text expected of a chat under a template, put together by rules.

Nothing here calls the pipeline: what a chat holds stands beside its row, what a template makes of
an answer stands beside the template, and these rules join the two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from tests.conformance.chats import Chat, Turn
from tests.conformance.templates import Place, Template

__all__ = ["NO_SAMPLE", "QUARANTINED", "expected", "features"]

QUARANTINED = "(quarantined)"
NO_SAMPLE = "(no sample)"
"""Nothing in the row is supervised; nothing is wrong with it."""


def features(turns: tuple[Turn, ...], *, tools: bool = False) -> set[str]:
    """Return what in a chat some templates cannot render."""
    found = {"tools"} if tools else set()
    users = [n for n, turn in enumerate(turns) if turn.role == "user"]
    for number, turn in enumerate(turns):
        when = "early" if users and number < users[-1] else "late"
        if turn.role == "system":
            found |= {"system"} if number == 0 else {"system", "system_later"}
        elif turn.role == "tool":
            found.add("results")
        if turn.reasoning:
            found.add(f"inline_{when}" if turn.inline else f"reasoning_{when}")
        if turn.calls:
            found.add("calls")
        if len(turn.calls) > 1:
            found.add("parallel")
        if turn.calls and turn.content:
            found.add("call_and_content")
    first = 1 if turns and turns[0].role == "system" else 0
    spoken = [turn.role for turn in turns[first:] if turn.role != "tool" and not turn.calls]
    wanted = ["user" if n % 2 == 0 else "assistant" for n in range(len(spoken))]
    return found if spoken == wanted else found | {"turns"}


def expected(
    chat: Chat,
    template: Template,
    *,
    reasoning: Literal["keep", "template", "drop"] = "keep",
    supervise_empty: bool = False,
) -> str:
    """Return the supervised text, or `QUARANTINED` or `NO_SAMPLE`."""
    if chat.bad:
        return QUARANTINED
    turns = chat.turns
    if reasoning == "drop":
        turns = tuple(replace(turn, reasoning="", inline=False) for turn in turns)
    kinds = ("reasoning_early", "reasoning_late", "inline_early", "inline_late")
    ignored = set(kinds) if reasoning == "template" else set()
    if template.cannot & features(turns, tools=chat.tools) - ignored:
        return QUARANTINED
    text = "".join(
        _supervised(turn, _place(turns, number), template, supervise_empty)
        for number, turn in enumerate(turns)
        if turn.role == "assistant" and turn.supervised
    )
    return text or NO_SAMPLE


def _place(turns: tuple[Turn, ...], number: int) -> Place:
    after = [turn.role for turn in turns[number + 1 :]]
    return Place(last=not after, late="user" not in after, next=after[0] if after else "")


def _supervised(turn: Turn, place: Place, template: Template, supervise_empty: bool) -> str:
    if turn.empty and not supervise_empty:
        return ""
    parts = template.parts(turn, place)
    end = "" if turn.open else parts.end
    if turn.said:
        assert parts.content.startswith(turn.said)
        return parts.content.removeprefix(turn.said) + parts.calls + end
    inserted = parts.empty_thought if supervise_empty else ""
    return inserted + parts.thought + parts.lead + parts.content + parts.calls + end
