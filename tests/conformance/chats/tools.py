"""Chats with tools, calls, results and reasoning.

Arrow gives all objects of a column one order of keys. What templates print as JSON therefore has
its keys in one order in all chats: a Parquet file would otherwise hold another than JSON Lines.
"""

from __future__ import annotations

import json
from typing import Any

from tests.conformance.chats.model import (
    Call,
    Chat,
    answer,
    as_message,
    call_row,
    chat,
    result,
    system,
    user,
)  # fmt: skip

__all__ = ["CHATS", "WEATHER_TOOL"]


def _tool(name: str, **properties: str) -> dict[str, Any]:
    kinds = {key: {"type": kind} for key, kind in sorted(properties.items())}
    parameters = {"properties": kinds, "required": [next(iter(kinds))], "type": "object"}
    function = {"description": f"To {name}.", "name": name, "parameters": parameters}
    return {"function": function, "type": "function"}


WEATHER_TOOL = _tool("get_weather", city="string", unit="string")
_TOOLS = [WEATHER_TOOL, _tool("search", limit="integer", query="string")]
_PARIS = Call("get_weather", {"city": "Paris"})
_OSLO = Call("get_weather", {"city": "Oslo", "unit": "C"})
_NEWS = Call("search", {"limit": 2, "query": "news"})
_ASKED = user("Weather in Paris?")
_SUNNY = answer("It is sunny.")
_18 = result("18 degrees")
_NULL = Call("get_weather", {"city": "Paris", "unit": None})
_NESTED = Call("find", {"limit": 3, "where": {"city": "Paris", "tags": ["a", "b c"]}})

_CALLS = [
    chat("call", _ASKED, answer(calls=(_PARIS,)), _18, _SUNNY),
    chat("call_with_tools", _ASKED, answer(calls=(_PARIS,)), _18, _SUNNY, tools=_TOOLS),
    chat("call_with_system", system("Use tools."), _ASKED, answer(calls=(_PARIS,)), _18, _SUNNY,
         tools=_TOOLS),
    chat("call_arguments_text", _ASKED, answer(calls=(_PARIS,)), _18, _SUNNY, as_text=True),
    chat("call_parallel", _ASKED, answer(calls=(_PARIS, _OSLO)), _18, result("3 degrees"), _SUNNY),
    chat("call_parallel_text", _ASKED, answer(calls=(_OSLO, _NEWS)), _18, result("[]"), _SUNNY,
         as_text=True),
    chat("call_and_content", _ASKED, answer("Let me look.", calls=(_PARIS,)), _18, _SUNNY),
    chat("call_last", _ASKED, answer(calls=(_OSLO,))),
    chat("call_last_with_content", _ASKED, answer("Wait.", calls=(_OSLO,))),
    chat("call_other_keys", user("News?"), answer(calls=(_NEWS,)), result("none"), answer("None.")),
    chat("call_nested", user("Find."), answer(calls=(_NESTED,)), result("x"), answer("Found x.")),
    chat("call_nested_text", user("Find."), answer(calls=(_NESTED,)), result("x"),
         answer("Found x."), as_text=True),
    chat("call_null", _ASKED, answer(calls=(_NULL,)), _18, _SUNNY, arrow=""),
    chat("call_null_text", _ASKED, answer(calls=(_NULL,)), _18, _SUNNY, as_text=True),
    chat("call_no_arguments", user("Time?"), answer(calls=(Call("now", {}),)), result("noon"),
         answer("Noon.")),
    chat("call_unicode", user("天气?"), answer(calls=(Call("get_weather", {
        "city": "Zürich 東京 \"q\"\\\n👩‍🚀 </tag> 'x'"}),)), result("ü"), answer("Schön.")),
    chat("call_in_first_of_two", _ASKED, answer(calls=(_PARIS,)), _18, _SUNNY, user("And now?"),
         answer("The same."), tools=_TOOLS),
    chat("calls_in_a_row", _ASKED, answer(calls=(_PARIS,)), _18, answer(calls=(_NEWS,)),
         result("quiet"), _SUNNY),
    chat("call_is_context", _ASKED, answer(calls=(_PARIS,), supervised=False), _18, _SUNNY,
         marks={1: {"weight": 0}}),
    chat("tools_without_call", user(), answer("No tool needed."), tools=_TOOLS),
    chat("tools_of_one", system("Hm."), user(), answer("No."), tools=[WEATHER_TOOL]),
    chat("tools_as_text", _ASKED, answer(calls=(_PARIS,)), _18, _SUNNY, as_text=True,
         tools=json.dumps(_TOOLS)),
    chat("tools_empty", user(), answer("I have none."), tools=[]),
]  # fmt: skip

_RESULTS = [
    chat("result_quoted", _ASKED, answer(calls=(_PARIS,)), result('It is "sunny",\n\t18 \\ü.'),
         _SUNNY),
    chat("result_object", _ASKED, answer(calls=(_PARIS,)), result('{"degrees": 18}'), _SUNNY,
         marks={2: {"content": {"degrees": 18}}}, arrow=""),
    chat("result_empty", _ASKED, answer(calls=(_PARIS,)), result(""), _SUNNY),
]  # fmt: skip


def _legacy() -> Chat:
    called = {"role": "assistant", "content": None,
              "function_call": {"name": "get_weather", "arguments": _PARIS.json}}  # fmt: skip
    given = {"role": "function", "name": "get_weather", "content": "18 degrees"}
    messages = [as_message(_ASKED), called, given, as_message(_SUNNY)]
    turns = (_ASKED, answer(calls=(_PARIS,)), _18, _SUNNY)
    return Chat("legacy_function_call", {"messages": messages}, turns)


def _padded() -> Chat:
    """Return a call as it comes out of a Parquet file, with all keys of all rows."""
    nothing = {"weight": None, "name": None, "reasoning_content": None, "prefix": None,
               "function_call": None}  # fmt: skip
    called = call_row(_PARIS)
    called["function"]["arguments"] = {"city": "Paris"}
    messages = [
        {**nothing, **as_message(_ASKED), "tool_calls": None},
        {**nothing, "role": "assistant", "content": None, "tool_calls": [called]},
        {**nothing, **as_message(_18), "tool_calls": None},
        {**nothing, **as_message(_SUNNY), "tool_calls": None, "tool_call_id": None},
    ]
    turns = (_ASKED, answer(calls=(_PARIS,)), _18, _SUNNY)
    return Chat("padded_with_nulls", {"messages": messages, "tools": None}, turns)


_R = {"reasoning": "Think of it.\nTwice."}

_REASONING = [
    chat("reasoning", user(), answer("Yes.", **_R)),
    chat("reasoning_multi", user("1"), answer("I."), user("2"), answer("II.", **_R)),
    chat("reasoning_earlier", user("1"), answer("I.", **_R), user("2"), answer("II.")),
    chat("reasoning_everywhere", user("1"), answer("I.", reasoning="One?"), user("2"),
         answer("II.", reasoning="Two?")),
    chat("reasoning_inline", user(), answer("Yes.", inline=True, **_R)),
    chat("reasoning_inline_multi", user("1"), answer("I."), user("2"),
         answer("II.", inline=True, **_R)),
    chat("reasoning_inline_earlier", user("1"), answer("I.", inline=True, **_R), user("2"),
         answer("II.")),
    chat("reasoning_only", user(), answer("", **_R)),
    chat("reasoning_only_first", answer("", **_R)),
    chat("reasoning_empty", user(), answer("Yes."), marks={1: {"reasoning_content": ""}}),
    chat("reasoning_null", user(), answer("Yes."), marks={1: {"reasoning_content": None}}),
    chat("reasoning_and_call", _ASKED, answer(calls=(_PARIS,), reasoning="Look it up."), _18,
         answer("Sunny.", reasoning="So it is.")),
    chat("reasoning_content_call", _ASKED,
         answer("A moment.", calls=(_PARIS,), reasoning="Look it up."), _18, _SUNNY),
]  # fmt: skip

CHATS = (*_CALLS, *_RESULTS, _legacy(), _padded(), *_REASONING)
