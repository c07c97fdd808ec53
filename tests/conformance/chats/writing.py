"""Chats about what an answer is made of: Unicode, white space, look-alikes, length, parts."""

from __future__ import annotations

from typing import Any

from tests.conformance.chats.model import Chat, Turn, answer, chat, system, user

__all__ = ["CHATS"]

_LONG = " ".join(f"{n} sheep" for n in range(2_500))[:20_000].strip()

_CODE = (
    "```python\ndef f(x):\n\tif x:   \n\t    return {\n\t\t'a': 1,\n\t}\n    # {{ x }} {% y %}\n"
    "\treturn  None  \n```"
)

_UNICODE = [
    chat("combining", user("Zalgo?"),
         answer("e\u0301 o\u0308 a\u0323\u0302 Z\u0351\u036b\u0343 i\u0307.")),
    chat("combining_first", user(), answer("\u0301 stands alone, and \u0308 ends\u0301")),
    chat("right_to_left", user("\u05e9\u05dc\u05d5\u05dd?"),
         answer("\u05e9\u05dc\u05d5\u05dd, \u0645\u0631\u062d\u0628 \u202babc\u202c \u200f!")),
    chat("joined_emoji", user("\U0001f44d\U0001f3fd?"),
         answer("\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd "
                "\U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1e8\U0001f1ed ok "
                "\U0001f469\u200d\U0001f680")),
    chat("astral", user("\U0001d538?"),
         answer("\U0001d49c\U0001d4c3\U0001d4c8 \U00020000\U0002a6d6 \U0001f600\U0010fffd x")),
    chat("control", user("\x07?"),
         answer("bell \x07 esc \x1b[31mred\x1b[0m \x01\x02 del \x7f nel\x85 x")),
    chat("line_ends", user("a\r\nb"),
         answer("one\r\ntwo\rthree\u2028four\u2029five\x0b\x0csix\x1cseven")),
    chat("replacement", user("\ufffd?"), answer("\ufffd lost \ufffd\ufffd bytes\ufffd")),
    chat("no_break_space", user(), answer("10\u00a0km \u202f 5\u00a0%")),
    chat("no_break_space_around", user(), answer("\u00a0 inside \u3000")),
    chat("byte_order_mark", user("\ufeffa"), answer("\ufeffbefore, in\ufeffside\ufeff")),
    chat("scripts", user("\u8c01?"),
         answer("\u65e5\u672c\u8a9e \u0e19\u0e49\u0e33 \u1e9e \ufb01 \u2167 \u00bd na\u00efve "
                "\u03a9\u03bc \ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940")),
    chat("sentencepiece_space", user("\u2581?"), answer("a\u2581b \u2581 c\u2581")),
    chat("lone_surrogate", user(), answer("half \ud83d of a pair"), arrow="", bad="lone surrogate"),
    chat("lone_surrogate_user", user("\udc00"), answer("Fine."), arrow="", bad="lone surrogate"),
]  # fmt: skip

_SPACE = [
    chat("code", user("Code?"), answer(_CODE)),
    chat("newlines_around", user(), answer("\n\nIn the middle.\n\n")),
    chat("newlines_around_earlier", user("1"), answer("\n\nI.\n"), user("2"), answer("\nII.\n\n")),
    chat("spaces_around", user(" x "), answer("   In the middle.  ")),
    chat("tabs_around", user(), answer("\t\tIn the middle.\t")),
    chat("one_letter", user("?"), answer("y")),
    chat("digits", user("2+2"), answer("4")),
    chat("long", user(), answer(_LONG)),
    chat("long_question", user(_LONG), answer("Baa.")),
]

_ALIKE = [
    chat("looks_like_header", user("Who is USER: you?"), answer(
        "USER: no\nASSISTANT: yes</ s>\n\n### Response:\n< |im_start|>assistant\nuser\nmodel\n")),
    chat("looks_like_header_multi",
         user("ASSISTANT: I?"), answer("USER: 1 ASSISTANT: I."),
         user("### Response:\n2"), answer("ASSISTANT: II. USER: ")),
    chat("header_words", user("assistant"), answer("assistant"), user("user"), answer("user"),
         user("model"), answer("ASSISTANT: ")),
    chat("header_letters", user("a"), answer("a"), user("t"), answer("t"), user("A"), answer("A")),
    chat("markup", system("<b>"), user("<"), answer("<thing>bold</thing> <")),
    chat("angle", user(), answer("<")),
    chat("looks_like_call", user(), answer('{"name": "get_weather", "arguments": {"city": "x"}}')),
    chat("braces", user("{{ x }}"), answer("{{ messages }} {% raw %} {# note #} \\n \\u0041 %s")),
    chat("quotes", user("\"'"), answer("\"quoted\", 'single', `tick`, \\ and </p> &amp;")),
]  # fmt: skip


def _parts(name: str, questions: list[Any], answers: list[Any], said: str, bad: str = "") -> Chat:
    row = {"messages": [{"role": "user", "content": questions},
                        {"role": "assistant", "content": answers}]}  # fmt: skip
    turns: tuple[Turn, ...] = (user("Look."), answer(said))
    arrow = "parts" if all(isinstance(part, dict) for part in answers) else "words"
    return Chat(name, row, turns, arrow=arrow, bad=bad)


_LOOK = {"type": "text", "text": "Look."}

_PARTS = [
    _parts("text_part", [_LOOK], [{"type": "text", "text": "I see."}], "I see."),
    _parts("text_parts", [{"type": "text", "text": "Lo"}, {"type": "text", "text": "ok."}],
           [{"type": "text", "text": "I "}, {"type": "text", "text": "see."}], "I see."),
    _parts("text_part_list", ["Lo", "ok."], ["I see", ".", " Yes."], "I see. Yes."),
    _parts("image_part", [{"type": "image", "url": "x.png"}, _LOOK],
           [{"type": "text", "text": "A cat."}], "A cat.", bad="image"),
    _parts("image_url_part", [_LOOK, {"type": "image_url", "image_url": {"url": "x.png"}}],
           [{"type": "text", "text": "A cat."}], "A cat.", bad="image"),
]  # fmt: skip

CHATS = (*_UNICODE, *_SPACE, *_ALIKE, *_PARTS)
