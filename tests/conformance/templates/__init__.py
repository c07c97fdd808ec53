"""The chat templates, written by hand in the manner of the families that people use."""
# ruff: noqa: RUF001 - the bars and blocks of DeepSeek's tokens are meant.

from __future__ import annotations

from tests.conformance.templates import plain, reasoning, tools
from tests.conformance.templates.model import Parts, Place, Template

__all__ = ["MARKS", "SPECIAL", "TEMPLATES", "Parts", "Place", "Template"]

TEMPLATES: tuple[Template, ...] = (*plain.TEMPLATES, *tools.TEMPLATES, *reasoning.TEMPLATES)

SPECIAL = (
    "<unk>", "<s>", "</s>", "<bos>", "<eos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|end|>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
    "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>", "[gMASK]", "<sop>", "<|observation|>", "<|start|>", "<|channel|>",
    "<|message|>", "<|return|>", "<|call|>",
)  # fmt: skip
"""The special tokens of all templates."""

MARKS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip
"""Tokens of their own, but not special."""
