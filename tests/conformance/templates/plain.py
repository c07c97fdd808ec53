"""Templates without tools: ChatML, and the manners of Llama, Gemma, Phi, Zephyr, Vicuna."""

from __future__ import annotations

from tests.conformance.templates.model import ALL_REASONING, Template, simple

__all__ = ["TEMPLATES"]

_NO_TOOLS = ALL_REASONING | {"tools", "calls"}
_NO_RESULTS = _NO_TOOLS | {"results"}
_ALTERNATES = _NO_RESULTS | {"turns", "system_later"}

_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}" + _CHATML_PROMPT
)
_CHATML_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + _CHATML
)

_MARKED_BOTH = (
    """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
""".strip()
    + _CHATML_PROMPT
)

_MARKED_CONTENT = (
    """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{- m.content }}{%- endgeneration %}
{%- else %}{{- m.content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
""".strip()
    + _CHATML_PROMPT
)

_LLAMA3 = """
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""".strip()

# No generation prompt: after [/INST] it is the assistant's turn.
_LLAMA2 = """
{%- set system = '' %}
{%- set rest = messages %}
{%- if messages[0].role == 'system' %}
{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
{%- set rest = messages[1:] %}
{%- endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate: user, assistant, user, ...') }}
{%- endif %}
{%- if m.role == 'user' %}
{{- bos_token + '[INST] ' + (system if loop.first else '') + m.content | trim + ' [/INST]' }}
{%- elif m.role == 'assistant' %}
{{- ' ' + m.content | trim + eos_token }}
{%- endif %}
{%- endfor %}
""".strip()

_GEMMA = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('No system role here') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate: user, model, user, ...') }}
{%- endif %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
""".strip()

# The end of the text stands after the last turn, which has ended already.
_PHI = """
{%- for m in messages %}
{%- if m.role in ('system', 'user', 'assistant') %}
{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}
""".strip()

# The generation prompt lacks the line feed of the header, so that the model writes it.
_ZEPHYR = """
{%- for m in messages %}
{{- '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}
{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
{%- endfor %}
""".strip()

_VICUNA = """
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content + ' ' }}
{%- elif m.role == 'user' %}{{- 'USER: ' + m.content + ' ' }}
{%- elif m.role == 'assistant' %}{{- 'ASSISTANT: ' + m.content + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT: ' }}{%- endif %}
""".strip()

_ALPACA = """
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content + '\\n\\n' }}
{%- elif m.role == 'user' %}{{- '### Instruction:\\n' + m.content + '\\n\\n' }}
{%- elif m.role == 'assistant' %}{{- '### Response:\\n' + m.content + eos_token + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}
""".strip()

_IM_END = simple("<|im_end|>")

TEMPLATES = (
    Template("chatml", _CHATML, "<s>", "<|im_end|>", _IM_END, _NO_TOOLS),
    Template("chatml_default_system", _CHATML_DEFAULT, "<s>", "<|endoftext|>", _IM_END, _NO_TOOLS),
    Template("marked_both", _MARKED_BOTH, "<s>", "<|im_end|>", _IM_END, _NO_TOOLS),
    Template("marked_content", _MARKED_CONTENT, "<s>", "<|endoftext|>", _IM_END, _NO_TOOLS),
    Template("llama3", _LLAMA3, "<|begin_of_text|>", "<|end_of_text|>",
             simple("<|eot_id|>", trim=True), _NO_TOOLS),
    Template("llama2", _LLAMA2, "<s>", "</s>", simple("</s>", lead=" ", trim=True), _ALTERNATES),
    Template("gemma", _GEMMA, "<bos>", "<eos>", simple("<end_of_turn>", trim=True),
             _ALTERNATES | {"system"}),
    Template("phi", _PHI, "<s>", "<|endoftext|>", simple("<|end|>"), _NO_RESULTS),
    Template("zephyr", _ZEPHYR, "<s>", "</s>", simple("</s>", lead="\n"), _NO_TOOLS),
    Template("vicuna", _VICUNA, "<s>", "</s>", simple("</s>"), _NO_RESULTS),
    Template("alpaca", _ALPACA, "<s>", "</s>", simple("</s>"), _NO_RESULTS),
)  # fmt: skip
