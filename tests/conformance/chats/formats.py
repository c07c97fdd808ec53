"""Chats in the other formats of rows: ShareGPT, prompt and completion, instruction."""

from __future__ import annotations

from typing import Any

from tests.conformance.chats.model import Chat, Turn, answer, as_message, system, user

__all__ = ["CHATS"]

_NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


def _sharegpt(name: str, *turns: Turn, marks: dict[int, dict[str, Any]] | None = None) -> Chat:
    items = [{"from": _NAMES[turn.role], "value": turn.content} for turn in turns]
    for number, extra in (marks or {}).items():
        items[number] |= extra
    return Chat(name, {"conversations": items}, turns, format="sharegpt")


_SHAREGPT = [
    _sharegpt("sharegpt", user(), answer("Nothing.")),
    _sharegpt("sharegpt_system", system("Be brief."), user("1"), answer("I."), user("2"),
              answer("II.")),
    _sharegpt("sharegpt_names", user(), answer("Nothing."),
              marks={0: {"from": "user"}, 1: {"from": "assistant"}}),
    _sharegpt("sharegpt_weight", user("1"), answer("I.", supervised=False), user("2"),
              answer("II."), marks={1: {"weight": 0}}),
    _sharegpt("sharegpt_null", user("1"), answer(""), user("2"), answer("II."),
              marks={1: {"value": None}}),
    _sharegpt("sharegpt_spaces", user(" 1"), answer(" \n I.  \n")),
]  # fmt: skip


def _pair(
    name: str, prompt: str | list[Turn], completion: str | list[Turn] | None, *turns: Turn
) -> Chat:
    def side(value: str | list[Turn] | None) -> Any:
        return [as_message(turn) for turn in value] if isinstance(value, list) else value

    kinds = ["lists" if isinstance(value, list) else "texts" for value in (prompt, completion)]
    row = {"prompt": side(prompt), "completion": side(completion)}
    return Chat(name, row, turns, format="prompt_completion", arrow="-".join(kinds))


def _context(text: str) -> Turn:
    return answer(text, supervised=False)


_CONTINUED = answer("The answer is 4.", said="The answer")
_FLAGGED_PROMPT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "The answer", "prefix": True},
]

_PAIRS = [
    _pair("pair_texts", "Why?", "Because.", user("Why?"), answer("Because.")),
    _pair("pair_texts_space", " Why?\n", " Because.\n", user(" Why?\n"), answer(" Because.\n")),
    _pair("pair_texts_null", "Why?", None, user("Why?")),
    _pair("pair_texts_empty", "Why?", "", user("Why?")),
    _pair("pair_lists", [user("Why?")], [answer("Because.")], user("Why?"), answer("Because.")),
    _pair("pair_earlier_answer", [user("1"), answer("I."), user("2")], [answer("II.")],
          user("1"), _context("I."), user("2"), answer("II.")),
    _pair("pair_long_completion", [system("Hm."), user("1")],
          [answer("I."), user("2"), answer("II.")],
          system("Hm."), user("1"), answer("I."), user("2"), answer("II.")),
    _pair("pair_list_and_text", [user("Why?")], "Because.", user("Why?"), answer("Because.")),
    _pair("pair_continued", [user("2+2?"), answer("The answer")], [answer(" is 4.")],
          user("2+2?"), _CONTINUED),
    _pair("pair_continued_text", [user("2+2?"), answer("The answer")], " is 4.",
          user("2+2?"), _CONTINUED),
    _pair("pair_continued_multi", [user("1+1?"), answer("2."), user("2+2?"), answer("The answer")],
          [answer(" is 4.")], user("1+1?"), _context("2."), user("2+2?"), _CONTINUED),
    Chat("pair_continued_flagged",
         {"prompt": _FLAGGED_PROMPT, "completion": [as_message(answer(" is 4."))]},
         (user("2+2?"), _CONTINUED), format="prompt_completion", arrow="lists-lists"),
]  # fmt: skip


def _instruction(name: str, row: dict[str, Any], *turns: Turn) -> Chat:
    return Chat(name, {"instruction": "", "input": "", **row}, turns, format="instruction")


_INSTRUCTIONS = [
    _instruction("instruction", {"instruction": "Add.", "output": "Added."},
                 user("Add."), answer("Added.")),
    _instruction("instruction_input", {"instruction": "Add.", "input": "1 and 2", "output": "3"},
                 user("Add.\n\n1 and 2"), answer("3")),
    _instruction("instruction_null_input", {"instruction": "Add.", "input": None, "output": "3"},
                 user("Add."), answer("3")),
    _instruction("instruction_no_output", {"instruction": "Add.", "output": ""}, user("Add.")),
    _instruction("instruction_code", {"instruction": "Code.", "output": "\tx = 1\n\ty = 2  \n"},
                 user("Code."), answer("\tx = 1\n\ty = 2  \n")),
    _instruction("instruction_system",
                 {"instruction": "Add.", "output": "Added.", "system": "Be brief."},
                 system("Be brief."), user("Add."), answer("Added.")),
]  # fmt: skip

CHATS = (*_SHAREGPT, *_PAIRS, *_INSTRUCTIONS)
