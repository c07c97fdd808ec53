"""Across tokenizers: a token of the student without a row of its head is found when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from pipeline.errors import ModelError
from pipeline.student.build.aligner import make_aligner


def _tokenizer(*words: str) -> Any:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=words[0])


def test_the_last_row_of_the_head_is_the_last_token_that_may_come() -> None:
    student = _tokenizer("?", "one", "two", "three")
    aligner = make_aligner(Path("student"), _tokenizer("?", "one"), student, rows=3)
    assert list(aligner.encode("one two").ids) == [1, 2]
    with pytest.raises(ModelError) as caught:
        aligner.encode("one three")
    assert "student: its tokenizer gives token 3, its head has 3 of them" in str(caught.value)
