"""Templates with tools but without reasoning: the manners of Mistral, Hermes, DeepSeek, Qwen 2."""
# ruff: noqa: RUF001 - the bars and blocks of DeepSeek's tokens are meant.

from __future__ import annotations

from tests.conformance.chats import Turn
from tests.conformance.chats.model import inline_text
from tests.conformance.templates.model import ALL_REASONING, Parts, Place, Template, bare

__all__ = ["TEMPLATES"]

# System text and tools stand in the LAST turn of the user: an earlier part of the chat renders
# differently when more follows. Content beside calls is lost.
_MISTRAL = """
{%- set system = '' %}
{%- set rest = messages %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content + '\\n\\n' %}
{%- set rest = messages[1:] %}
{%- endif %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list | length %}
{%- set ns = namespace(turns=0, users=0) %}
{{- bos_token }}
{%- for m in rest %}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
{%- if (m.role == 'user') != (ns.turns % 2 == 0) %}
{{- raise_exception('After the system message roles must alternate') }}
{%- endif %}
{%- set ns.turns = ns.turns + 1 %}
{%- endif %}
{%- if m.role == 'user' %}
{%- set ns.users = ns.users + 1 %}
{%- if ns.users == users and tools %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + (system if ns.users == users else '') + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}
{%- if not loop.first %}{{- ', ' }}{%- endif %}
{{- '{"name": ' + call.function.name | tojson + ', "arguments": ' }}
{{- call.function.arguments | tojson + '}' }}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + m.content | tojson + '}[/TOOL_RESULTS]' }}
{%- else %}{{- raise_exception('Only user, assistant and tool') }}
{%- endif %}
{%- endfor %}
""".strip()


def _mistral(turn: Turn, place: Place) -> Parts:
    if not turn.calls:
        return Parts(bare(turn).strip(), "</s>", lead=" ")
    items = (f'{{"name": "{call.name}", "arguments": {call.json}}}' for call in turn.calls)
    return Parts("", "</s>", calls=f"[TOOL_CALLS] [{', '.join(items)}]")


# The arguments are joined to text as they are: an object is a TypeError.
_HERMES = """
{%- if tools %}
{{- '<|im_start|>system\\nYou may call: <tools>' }}
{%- for tool in tools %}{{- ' ' + tool | tojson }}{%- endfor %}
{{- ' </tools><|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|im_start|>tool\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role }}
{%- if m.content or not m.tool_calls %}{{- '\\n' + m.content }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""".strip()


def _calls(turn: Turn) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.json}}}\n</tool_call>'
        for call in turn.calls
    )


def _chatml_calls(turn: Turn, place: Place) -> Parts:
    calls = _calls(turn)
    return Parts(bare(turn), "<|im_end|>", calls="\n" + calls if calls and turn.content else calls)


# Whole answers, calls included, stand between the marks.
_MARKED_CALLS = """
{%- if tools %}
{{- '<|im_start|>system\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
{%- if m.content or not loop.first %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""".strip()

# All system text goes to the front, tools are not rendered, thoughts are cut off, and after a
# tool's result the answer has no header.
_DEEPSEEK = """
{%- set ns = namespace(system='', tool=false) %}
{%- for m in messages %}
{%- if m.role == 'system' %}
{%- set ns.system = (ns.system + '\\n\\n' if ns.system else '') + m.content %}
{%- endif %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- set ns.tool = false %}
{{- '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' %}
{%- if not ns.tool %}{{- '<｜Assistant｜>' }}{%- endif %}
{%- set ns.tool = false %}
{%- if m.content %}{{- m.content.split('</think>')[-1] }}{%- endif %}
{%- if m.tool_calls %}
{{- '<｜tool▁calls▁begin｜>' }}
{%- for call in m.tool_calls %}
{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' }}
{{- call.function.arguments + '\\n```<｜tool▁call▁end｜>' }}
{%- endfor %}
{{- '<｜tool▁calls▁end｜>' }}
{%- endif %}
{{- '<｜end▁of▁sentence｜>' }}
{%- elif m.role == 'tool' %}
{%- set ns.tool = true %}
{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.tool %}{{- '<｜Assistant｜>' }}{%- endif %}
""".strip()


def _deepseek(turn: Turn, place: Place) -> Parts:
    calls = "".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call.name}\n```json\n{call.json}\n```"
        "<｜tool▁call▁end｜>"
        for call in turn.calls
    )
    content = inline_text(turn).split("</think>")[-1] if turn.inline else turn.content
    return Parts(
        content,
        "<｜end▁of▁sentence｜>",
        calls=f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>" if calls else "",
    )


def _hermes(turn: Turn, place: Place) -> Parts:
    # The header has no line feed before a call: the generation prompt's is the call's own.
    return _chatml_calls(turn, place)


TEMPLATES = (
    Template("mistral", _MISTRAL, "<s>", "</s>", _mistral,
             ALL_REASONING | {"turns", "system_later", "call_and_content"}),
    Template("hermes", _HERMES, "<s>", "<|im_end|>", _hermes, ALL_REASONING),
    Template("marked_calls", _MARKED_CALLS, "<s>", "<|im_end|>", _chatml_calls, ALL_REASONING),
    Template("deepseek", _DEEPSEEK, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", _deepseek,
             ALL_REASONING | {"tools", "inline_early", "inline_late"}),
)  # fmt: skip
