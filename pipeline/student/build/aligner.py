"""Two tokenizers joined, as far as rows of the one become rows of the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.retokenise import Aligner, Pieces
from pipeline.errors import ModelError

__all__ = ["make_aligner"]


def make_aligner(folder: Path, teacher: Any, student: Any, *, rows: int) -> Aligner:
    """Join the two tokenizers; `rows` is the size of the student's vocabulary in its head.

    Raises:
        ModelError: one of them is not of the `tokenizers` library, whose decoder gives the text of
            each token. Later, when rows are read: a token that the student has no embedding for.
    """
    from tokenizers.decoders import DecodeStream

    backends = []
    for tokenizer, place in ((teacher, "the cache"), (student, str(folder))):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{place}: a {type(tokenizer).__name__}, which says nothing of the text of single "
                "tokens",
                expected="a tokenizer with tokenizer.json, for loss.cross_tokenizer",
            )
        backends.append(backend)
    theirs, ours = backends

    def texts(backend: Any, ids: Sequence[int]) -> list[str | None]:
        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(backend, number) for number in ids]

    def encode(text: str) -> Pieces:
        ids = ours.encode(text, add_special_tokens=False).ids
        if max(ids, default=0) >= rows:
            raise ModelError(
                f"{folder}: its tokenizer gives token {max(ids)}, its head has {rows} of them",
                expected="a row of the head for each token",
                do="resize the student's embeddings to its tokenizer first",
            )
        return Pieces(ids, texts(ours, ids))

    vocabulary, roles = student.get_vocab(), {}
    for name in ("bos_token_id", "eos_token_id"):
        number, other = getattr(teacher, name, None), getattr(student, name, None)
        if number is not None and other is not None:
            roles[number] = other
        elif number is not None and name == "bos_token_id":
            roles[number] = -1  # a student that begins with nothing
    specials: dict[int, int] = {}
    student_added = set(student.added_tokens_decoder)
    for number, token in teacher.added_tokens_decoder.items():
        same = vocabulary.get(str(token.content))
        if same in student_added:
            specials[number] = int(same)
        elif number in roles:
            specials[number] = int(roles[number])
    return Aligner(lambda ids: texts(theirs, ids), encode, specials.get)
