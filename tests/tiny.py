"""A teacher of a few hundred thousand random weights, its tokenizer and its corpus, from seeds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = """
the a list of numbers returns value when called with an open file and reads each line from it into
dictionary where keys are names that map to function object which raises error if module cannot be
imported because path does not exist on this machine so try again later after checking every
setting carefully for mistakes in order not to lose any data stored
"""
_WORDS = _TEXT.split()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 600
TALKER_ENDS = list(range(100, 140))
"""End tokens of the tiny teacher where it writes: so many that many of its responses end."""
TALKER_VOCABULARY = 528
"""Tokens of its tokenizer; its head has 576 rows."""


def write_corpus(folder: Path, *, samples: int = 56) -> Path:
    """Write chats and documents, one JSON object a line, of very different lengths."""
    draw = random.Random(7)

    def text(words: int) -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(words)) + "."

    lines = []
    for _ in range(samples):
        messages = [
            {"role": "user", "content": text(draw.randint(3, 10)) + "?"},
            {"role": "assistant", "content": text(draw.randint(8, 45))},
        ]
        if draw.random() < 0.3:
            messages += [
                {"role": "user", "content": text(4)},
                {"role": "assistant", "content": text(draw.randint(5, 20))},
            ]
        lines.append(json.dumps({"messages": messages}))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "chats.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def make_tokenizer(corpus: Path, *, template: str | None = TEMPLATE, size: int = VOCABULARY) -> Any:
    """Train a byte-level BPE on the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus.read_text(encoding="utf-8"), " ".join(_WORDS)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0], bos_token=SPECIAL[1]
    )
    fast.chat_template = template
    return fast


def make_teacher(folder: Path, tokenizer: Any, *, seed: int = 0, layers: int = 4) -> Path:
    """Save a Llama with seeded weights, wide enough that its distributions are not flat."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # padded, as real heads are
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # the CPU kernels of vLLM want 64
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
