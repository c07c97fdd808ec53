"""What is held at one time is bounded by characters, not by the number of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.corpus.chat.conversation import Conversation
from pipeline.corpus.chat.rendering import encoder, render
from pipeline.corpus.chat.rendering.template import load_template

Build = Callable[..., Any]
TEMPLATE = (
    "{{ tools | tojson }}{% for m in messages %}{{ m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_shapes_with_long_tools_are_forgotten(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "_REMEMBERED", 5_000)
    template = load_template(tokenizer, TEMPLATE)
    renderer = render.ChatRenderer(template, ("<|im_end|>",))
    for number in [*range(9), 0]:
        tools = [{"name": f"tool {number}", "description": "x" * 2_000}]
        found = renderer.render(Conversation(CHAT, tools=tools), "row")
        assert [found.text[a:b] for a, b in found.spans] == ["a<|im_end|>"]
        assert len(renderer._shapes) <= 2
    huge = [{"name": "t", "description": "x" * 9_000}]
    assert renderer.render(Conversation(CHAT, tools=huge), "row").spans
    assert not renderer._shapes
    assert not renderer._remembered


def test_texts_are_encoded_in_parts(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_AT_ONCE", 10)
    texts = ["what does it do", "", "user", "answer", "x" * 50, "it"]
    whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    parts = encoder.TextEncoder(tokenizer)
    assert list(map(len, encoder._groups(texts))) == [1, 3, 1, 1]
    assert [item.ids_L.tolist() for item in parts.encode(texts)] == whole
    assert [ids_L.tolist() for ids_L in parts.encode_ids(texts)] == whole
