"""A chat as transformers renders it, without the pipeline."""

from __future__ import annotations

import json

from tests.conformance.chats import Chat
from tests.conformance.chats.model import as_message
from tests.conformance.templates import Template
from tests.conformance.vocabularies import tokenizer_of

__all__ = ["rendered"]


def rendered(chat: Chat, template: Template) -> str | None:
    """Render the turns; arguments of calls as objects, or as text where objects are refused."""
    render = tokenizer_of("bytes", template).apply_chat_template
    tools = chat.row.get("tools") if chat.tools else None
    tools = json.loads(tools) if isinstance(tools, str) else tools
    for as_text in (False, True):
        messages = [as_message(turn, as_text=as_text) for turn in chat.turns]
        messages = [{**message, "content": message["content"] or ""} for message in messages]
        try:
            return str(render(messages, tools=tools, tokenize=False))
        except Exception:
            continue
    return None
