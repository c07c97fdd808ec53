"""Templates that render reasoning: the manners of Qwen, GLM, Harmony, and a prompt that thinks."""

from __future__ import annotations

import json

from tests.conformance.chats import Turn
from tests.conformance.templates.model import Parts, Place, Template

__all__ = ["TEMPLATES"]

# Splits `content` into reasoning and content, and finds the last turn of the user.
_LAST_USER = """
{%- set ns = namespace(query=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{%- set ns.query = loop.index0 %}{%- endif %}
{%- endfor %}
"""
_SPLIT = """
{%- set content = m.content if m.content is string else '' %}
{%- set reasoning = '' %}
{%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
"""

_QWEN = ("""
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\n\\nCall one by its name and arguments.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
""" + _LAST_USER + """
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}""" + _SPLIT + """
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.query and (loop.last or reasoning) %}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}
{%- endif %}
{%- for call in m.tool_calls or [] %}
{%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{- call.function.arguments }}
{%- else %}{{- call.function.arguments | tojson }}
{%- endif %}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- set before = '' if loop.first else messages[loop.index0 - 1].role %}
{%- set after = '' if loop.last else messages[loop.index0 + 1].role %}
{%- if before != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if after != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""").strip()  # fmt: skip


def _qwen(turn: Turn, place: Place) -> Parts:
    thinks = place.late and bool(turn.reasoning)
    inserts = place.late and place.last and not turn.reasoning
    calls = "\n".join(
        f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.json}}}\n</tool_call>'
        for call in turn.calls
    )
    stripped = thinks or inserts or turn.inline
    return Parts(
        turn.content.lstrip("\n") if stripped else turn.content,
        "<|im_end|>",
        empty_thought="<think>\n\n</think>\n\n" if inserts else "",
        thought="<think>\n" + turn.reasoning.strip("\n") + "\n</think>\n\n" if thinks else "",
        calls="\n" + calls if calls and turn.content else calls,
    )


# The generation prompt opens the thought; a turn without one has no <think> at all.
_THINKING_PROMPT = (_LAST_USER + """
{%- for m in messages %}
{%- if m.role == 'assistant' %}""" + _SPLIT + """
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.query and reasoning %}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}
""").strip()  # fmt: skip


def _thinking_prompt(turn: Turn, place: Place) -> Parts:
    thought = turn.reasoning.strip("\n") + "\n</think>\n\n" if turn.reasoning else ""
    content = turn.content.lstrip("\n") if turn.inline else turn.content
    return Parts(content, "<|im_end|>", thought=thought if place.late else "")


_GLM = ("""
{{- '[gMASK]<sop>' }}
{%- if tools %}{{- '<|system|>\\n# Tools' }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}""" + _SPLIT + """
{{- '<|assistant|>\\n' }}
{%- if reasoning %}{{- '<think>' + reasoning + '</think>' }}{%- endif %}
{{- '\\n' + content if content and reasoning else content }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>' + call.function.name }}
{%- for key, value in call.function.arguments.items() %}
{{- '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' }}
{{- value if value is string else value | tojson }}
{{- '</arg_value>' }}
{%- endfor %}
{{- '\\n</tool_call>' }}
{%- endfor %}
{%- elif m.role == 'tool' %}
{{- '<|observation|>\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- else %}{{- '<|' + m.role + '|>\\n' + m.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
""").strip()  # fmt: skip
_GLM_ENDS = {"user": "<|user|>", "tool": "<|observation|>"}


def _glm(turn: Turn, place: Place) -> Parts:
    calls = ""
    for call in turn.calls:
        calls += f"\n<tool_call>{call.name}"
        for key, value in call.arguments.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            calls += f"\n<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>"
        calls += "\n</tool_call>"
    between = "\n" if turn.content else ""
    return Parts(
        turn.content,
        _GLM_ENDS.get(place.next, ""),
        thought=f"<think>{turn.reasoning}</think>{between}" if turn.reasoning else "",
        calls=calls,
    )


_HARMONY = ("""
{{- '<|start|>system<|message|>Channels: analysis, commentary, final.<|end|>' }}
{%- set ask = messages[0].content if messages[0].role == 'system' else '' %}
{%- if ask or tools %}
{{- '<|start|>developer<|message|>' + ask }}
{%- if tools %}{{- '# Tools' }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
{%- endif %}
{{- '<|end|>' }}
{%- endif %}
""" + _LAST_USER + """
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'assistant' %}
{{- '<|start|>assistant' }}
{%- if m.reasoning_content and loop.index0 > ns.query %}
{{- '<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|><|start|>assistant' }}
{%- endif %}
{%- if m.tool_calls %}
{%- if m.content %}
{{- '<|channel|>commentary<|message|>' + m.content + '<|end|><|start|>assistant' }}
{%- endif %}
{%- set call = m.tool_calls[0].function %}
{{- ' to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson + '<|call|>' }}
{%- else %}
{{- '<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
""").strip()  # fmt: skip


def _harmony(turn: Turn, place: Place) -> Parts:
    from tests.conformance.templates.model import bare

    thought = ""
    if turn.reasoning and place.late and not turn.inline:
        thought = f"<|channel|>analysis<|message|>{turn.reasoning}<|end|><|start|>assistant"
    if turn.calls:
        call = turn.calls[0]
        said = f" to=functions.{call.name}<|channel|>commentary json<|message|>{call.json}"
        if not turn.content:
            return Parts("", "<|call|>", thought=thought, calls=said)
        said, lead = f"<|end|><|start|>assistant{said}", "<|channel|>commentary<|message|>"
        return Parts(turn.content, "<|call|>", thought=thought, lead=lead, calls=said)
    end = "<|return|>" if place.last else "<|end|>"
    return Parts(bare(turn), end, thought=thought, lead="<|channel|>final<|message|>")


_EARLY = frozenset({"reasoning_early", "inline_early"})

TEMPLATES = (
    Template("qwen3", _QWEN, "<s>", "<|im_end|>", _qwen, _EARLY),
    Template("thinking_prompt", _THINKING_PROMPT, "<s>", "<|im_end|>", _thinking_prompt,
             _EARLY | {"tools", "calls"}),
    Template("glm", _GLM, "<s>", "<|endoftext|>", _glm,
             end_tokens=("<|user|>", "<|observation|>")),
    Template("harmony", _HARMONY, "<s>", "<|return|>", _harmony,
             frozenset({"system_later", "parallel", "reasoning_early"}),
             end_tokens=("<|call|>",)),
)  # fmt: skip
