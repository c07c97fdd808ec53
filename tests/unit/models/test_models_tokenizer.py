"""Tokenizers by content: fingerprints, differences, and the files that a cache carries."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import ModelError
from pipeline.models.tokenizer import (
    end_tokens,
    load_tokenizer,
    tokenizer_files,
    tokenizer_from_files,
    vocabulary_difference,
    vocabulary_fingerprint,
)

WORDS = {"<unk>": 0, "a": 1, "b": 2, "ä": 3, "\U0001f600": 4}


def _tokenizer(words: dict[str, int] = WORDS, template: Any = "{{ messages }}") -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrap: Any = PreTrainedTokenizerFast
    tokenizer = wrap(tokenizer_object=inner, unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def test_files_give_the_same_tokenizer_wherever_it_was(tmp_path: Path) -> None:
    first = _tokenizer()
    first.add_tokens(["<new>"])
    files = tokenizer_files(first)
    again = tokenizer_from_files(files)
    text = "a ä <new> b unknown \U0001f600"
    assert again(text).input_ids == first(text).input_ids
    assert again.get_vocab() == first.get_vocab()
    assert again.chat_template == first.chat_template
    assert vocabulary_fingerprint(again) == vocabulary_fingerprint(first)
    assert tokenizer_files(again) == files
    for name in ("one", "two"):
        first.save_pretrained(tmp_path / name)
    one, two = (load_tokenizer(tmp_path / name) for name in ("one", "two"))
    assert tokenizer_files(one) == tokenizer_files(two) == files
    assert not any(str(tmp_path).encode() in data for data in files.values())


def test_several_chat_templates_travel_along() -> None:
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    files = tokenizer_files(_tokenizer(template=templates))
    assert tokenizer_from_files(files).chat_template == templates
    assert all(not name.startswith("/") for name in files)


def test_fingerprint_is_of_tokens_and_ids() -> None:
    base = vocabulary_fingerprint(_tokenizer())
    assert len(base) == 64
    assert vocabulary_fingerprint(_tokenizer(dict(reversed(WORDS.items())))) == base
    assert vocabulary_fingerprint(_tokenizer({**WORDS, "c": 5})) != base
    assert vocabulary_fingerprint(_tokenizer({**WORDS, "a": 2, "b": 1})) != base
    added = _tokenizer()
    added.add_tokens(["<new>"])
    assert vocabulary_fingerprint(added) != base


def test_difference_is_supervised_with_examples() -> None:
    assert vocabulary_difference(WORDS, dict(WORDS)) == "nothing"
    found = {"<unk>": 0, "a": 2, "b": 1, "c": 3, "d": 4, "e": 5, "f": 6}
    text = vocabulary_difference(WORDS, found)
    assert "2 missing (such as 'ä', '\U0001f600')" in text
    assert "4 more (such as 'c', 'd', 'e')" in text
    assert "2 under another id (such as 'a', 'b')" in text
    assert vocabulary_difference(WORDS, {}, limit=1) == "5 missing (such as '<unk>')"


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_every_source_of_end_tokens(tmp_path: Path) -> None:
    tokenizer: Any = SimpleNamespace(eos_token_id=7)
    assert end_tokens(tmp_path, tokenizer) == (7,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 3]}')
    assert end_tokens(tmp_path, tokenizer) == (3, 7, 9)
    (tmp_path / "config.json").write_text('{"eos_token_id": null}')
    (tmp_path / "generation_config.json").write_text("{}")
    assert end_tokens(tmp_path, SimpleNamespace(eos_token_id=None)) == ()


def test_code_that_a_tokenizer_brings_is_neither_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on a terminal; whoever answers yes runs it."""
    marker = tmp_path / "ran"
    (tmp_path / "config.json").write_text('{"model_type": "theirs"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["theirs.Theirs", null]}, "tokenizer_class": "Theirs"}'
    )
    (tmp_path / "theirs.py").write_text(f"open({str(marker)!r}, 'w')\nclass Theirs:\n    pass\n")
    monkeypatch.setattr("builtins.input", lambda _text: "y")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
    assert not marker.exists()
