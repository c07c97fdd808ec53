"""Vocabularies mapped by content: other ids, missing pieces, other tokenisation."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.vocabulary import first_disagreement, map_vocabulary


def test_each_kind_of_piece() -> None:
    teacher = {"a": 0, "b": 1, "c": 2, "gone": 3, "far": 4}
    student = {"a": 0, "c": 1, "b": 2, "own": 3, "far": 9}
    mapping = map_vocabulary(teacher, student, head_rows=8)
    assert mapping.size == 4, "`far` has an id, but no row of the head"
    assert mapping.student_ids_V.tolist() == [0, 2, 1, 4 + 3, 4 + 4]
    assert (mapping.same, mapping.moved) == (1, 2)
    assert mapping.missing == ("gone", "far")
    assert mapping.extra == ("own",)
    assert not mapping.is_identity
    report = mapping.report()
    assert report.startswith("1 pieces keep their id; 2 are under another id; 2 are the teacher's")
    assert "'gone', 'far'; 1 are the student's alone: 'own'" in report
    # A teacher's head has rows beyond its tokenizer, and one of them may have been cached.
    ids = np.asarray([1, 3, 7], np.int32)
    assert mapping.apply(ids).tolist() == [2, 7, 11]
    assert mapping.apply(ids).dtype == np.int32


def test_the_same_vocabulary_is_the_identity() -> None:
    words = {"a": 0, "b": 1}
    assert map_vocabulary(words, dict(reversed(words.items())), head_rows=64).is_identity
    assert not map_vocabulary(words, words, head_rows=1).is_identity
    assert not map_vocabulary(words, {**words, "c": 2}, head_rows=64).is_identity


@given(st.integers(0, 2**32), st.integers(0, 30), st.integers(0, 30), st.integers(0, 40))
def test_ids_stay_distinct(seed: int, ours: int, theirs: int, rows: int) -> None:
    draw = random.Random(seed)
    pieces = [f"p{i}" for i in range(40)]
    teacher = {piece: i for i, piece in enumerate(draw.sample(pieces, ours))}
    student = {piece: i for i, piece in enumerate(draw.sample(pieces, theirs))}
    mapping = map_vocabulary(teacher, student, head_rows=rows)
    mapped = mapping.apply(np.arange(ours + 3, dtype=np.int32)).tolist()
    assert len(set(mapped)) == len(mapped)
    by_id = {number: piece for piece, number in student.items()}
    for piece, number in teacher.items():
        inside = mapped[number] < mapping.size
        assert inside == (piece in student and student[piece] < rows)
        assert not inside or by_id[mapped[number]] == piece
    assert mapping.same + mapping.moved + len(mapping.missing) == ours


def _bpe(merges: list[tuple[str, str]], order: list[str]) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    wrap: Any = PreTrainedTokenizerFast
    vocabulary = {piece: i for i, piece in enumerate(order)}
    return wrap(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges)))


def test_the_same_pieces_with_other_merges_are_found_out() -> None:
    pieces = ["a", "b", "c", "ab", "bc"]
    first = _bpe([("a", "b"), ("b", "c")], pieces)
    moved = _bpe([("a", "b"), ("b", "c")], pieces[::-1])
    other = _bpe([("b", "c"), ("a", "b")], pieces[::-1])
    mapping = map_vocabulary(first.get_vocab(), moved.get_vocab(), head_rows=5)
    assert mapping.moved == 4
    assert first_disagreement(first, moved, mapping, ["abc", "cab"]) is None
    assert first_disagreement(first, other, mapping, ["ab", "bc"]) is None
    found = first_disagreement(first, other, mapping, ["ab", "aabc"])
    assert found == "where the cache has ['ab', 'c'], the student's has ['a', 'bc']"
