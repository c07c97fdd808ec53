"""What two renderings share at a turn's beginning, and what of it no model would generate."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["common_length", "whole_markup", "without_prompt", "without_thoughts"]

_EMPTY_THOUGHT = re.compile(
    r"<(?P<tag>[^<>/\s]*think[^<>/\s]*|thought|reasoning|reflection)>\s*</(?P=tag)>\s*"
    r"|\[THINK\]\s*\[/THINK\]\s*"
    r"|<\|?START_THINKING\|?>\s*<\|?END_THINKING\|?>\s*",
    re.IGNORECASE,
)
_OPENING = 32
"""Characters before a turn in which the prompt may have opened an empty thought."""
_UNCLOSED = re.compile(r"[<\[][^<>\[\]\s]*\Z")


def common_length(one: str, other: str) -> int:
    """Return the number of characters that two texts share at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def whole_markup(prompt: str, length: int) -> int:
    """Shorten the shared beginning of a prompt so that it ends outside of a tag.

    `<think>` of a prompt and `<tool_call>` of an answer share a bracket and a letter.
    """
    unclosed = _UNCLOSED.search(prompt, 0, length) if length < len(prompt) else None
    return length if unclosed is None else unclosed.start()


def without_prompt(text: str, rest: str) -> int | None:
    """Return where the text before an answer has the rest of the prompt behind it.

    The two may differ in the white space before the header of the answer alone.
    """
    header, answer = rest.lstrip(), text.lstrip()
    same = common_length(header, answer)
    if not header.strip() or same < len(header.rstrip()):
        return None
    return len(text) - len(answer) + same


def without_thoughts(
    text: str, spans: Sequence[tuple[int, int]], first: int
) -> list[tuple[int, int]]:
    """Return the spans without the empty thoughts before a turn's first own text.

    The generation prompt may have opened such a thought, or begin before its white space.
    """
    kept = []
    for begin, stop in spans:
        at, low = begin, max(0, begin - _OPENING)
        for match in _EMPTY_THOUGHT.finditer(text, low, max(begin, min(first, stop))):
            if text[at : match.start()].strip():
                kept.append((at, match.start()))
            at = max(at, match.end())
        if at < stop:
            kept.append((at, stop))
    return kept
