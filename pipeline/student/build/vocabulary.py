"""The student's vocabulary against the cache's: the same, mapped by content, or another tokenizer.

Decided once, before anything is loaded; what follows from it (rows in the student's ids, rows of
the head in use, tokenizer of the exported student) is asked from here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.io.reader import Cache
from pipeline.data.mapped import MappedRows
from pipeline.data.retokenise import Aligner, Pieces, RetokenisedRows
from pipeline.data.source import RowSource
from pipeline.errors import ModelError
from pipeline.loss.settings import CrossTokenizer
from pipeline.models.tokenizer import (
    load_tokenizer,
    tokenizer_files,
    tokenizer_from_files,
    vocabulary_difference,
    vocabulary_fingerprint,
)
from pipeline.models.vocabulary import VocabularyMap, first_disagreement, map_vocabulary

__all__ = ["StudentVocabulary", "open_vocabulary"]

_log = logging.getLogger(__name__)
_PROBE_ROWS = 64


@dataclass(frozen=True)
class StudentVocabulary:
    """How the student's tokens stand to the cache's."""

    cache: Cache
    size: int
    """Rows of the head in use; those from here on are padding and get no mass."""
    files: Mapping[str, bytes]
    """Tokenizer files of the exported student."""
    sentence: str = ""
    """For the card; empty where the vocabularies are the same."""
    digest: str | None = None
    """What decides the student's rows; None where they are the cache's own."""
    wrap: Callable[[RowSource], RowSource] | None = None
    retokenised: bool = False
    rows: RowSource | None = None
    """The training rows in the cache's tokens; None: all of them, whole."""

    @cached_property
    def train(self) -> RowSource:
        """The training rows in the student's tokens."""
        return self._rows("train")

    @cached_property
    def heldout(self) -> RowSource:
        """The held-out rows in the student's tokens."""
        return self._rows("heldout")

    def pack_length(self) -> int:
        """Return the tokens of the longest sequence that there can be."""
        longest = int(self.cache.manifest.identity["corpus"]["max_length"])
        if not self.retokenised:
            return longest
        return max(longest, int(self.train.lengths().max(initial=0)))

    def _rows(self, split: str) -> RowSource:
        source = self.rows if split == "train" else None
        source = source or self.cache.source(split)
        return self.wrap(source) if self.wrap is not None else source


def open_vocabulary(
    student_folder: Path,
    cache: Cache,
    *,
    cross_tokenizer: CrossTokenizer,
    train: RowSource | None = None,
) -> StudentVocabulary:
    """Compare the student's tokenizer with the cache's, by content.

    - The same pieces under the same ids: nothing to do.
    - The same pieces under other ids, or some on one side alone, and text that both cut alike:
      ids are mapped, and what maps is logged.
    - Anything else is another tokenizer: refused, unless `cross_tokenizer` says how to train
      across it.

    Args:
        student_folder: of the model that the student starts from.
        cache: the cache.
        cross_tokenizer: what to do about another tokenizer.
        train: the training rows to read; None: all of the cache, whole.

    Raises:
        ModelError: another tokenizer, or one without what the mode needs.
    """
    cache_files = cache.tokenizer_files()
    teacher, student = tokenizer_from_files(cache_files), load_tokenizer(student_folder)
    wanted, found = teacher.get_vocab(), student.get_vocab()
    mapping = map_vocabulary(wanted, found, head_rows=_head_rows(student_folder))
    if cross_tokenizer == "uld":
        across = _across(student_folder, cache, teacher, student, mapping)
        return replace(across, rows=train)
    if mapping.is_identity:
        return StudentVocabulary(cache, mapping.size, cache_files, rows=train)
    problem = _problem(cache, teacher, student, mapping)
    if problem is not None:
        raise ModelError(
            f"{student_folder}: the student's tokenizer differs from the cache's: "
            f"{vocabulary_difference(wanted, found)}; {problem}",
            expected=f"the same {len(wanted)} tokens, under whatever ids",
            do="choose a student of the teacher's family, make a cache with a teacher of the "
            "student's, or train across tokenizers with --loss.cross_tokenizer uld "
            "--temperature 1",
        )
    _log.info("vocabulary mapped by content: %s", mapping.report())
    return StudentVocabulary(
        cache,
        mapping.size,
        _student_files(student, teacher),
        sentence=f"mapped by content: {mapping.report()}",
        digest=vocabulary_fingerprint(student),
        wrap=lambda source: MappedRows(
            source, mapping.apply, mapping.size, lambda i: str(teacher.convert_ids_to_tokens(i))
        ),
        rows=train,
    )


def _head_rows(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])


def _problem(cache: Cache, teacher: Any, student: Any, mapping: VocabularyMap) -> str | None:
    """Return why pieces cannot simply be mapped; None where they can."""
    if not mapping.same + mapping.moved:
        return "they share no piece"
    texts = []
    for row in _first_rows(cache.source("heldout")):
        ids = row.input_ids_L
        if (mapping.apply(ids) >= mapping.size).any():
            unknown = ids[mapping.apply(ids) >= mapping.size]
            piece = teacher.convert_ids_to_tokens(int(unknown[0]))
            return f"the cache's sequences hold {piece!r}, which it lacks"
        texts.append(teacher.decode(ids.tolist()))
    return first_disagreement(teacher, student, mapping, texts)


def _first_rows(source: RowSource) -> list[Any]:
    rows: list[Any] = []
    for shard, count in enumerate(source.shard_rows()):
        rows += source.read_rows(shard, range(min(count, _PROBE_ROWS - len(rows))))
        if len(rows) >= _PROBE_ROWS:
            break
    return rows


def _student_files(student: Any, teacher: Any) -> dict[str, bytes]:
    """Return the student's tokenizer with the chat template that the cache was made with."""
    if teacher.chat_template:
        student.chat_template = teacher.chat_template
    return tokenizer_files(student)


def _across(
    folder: Path, cache: Cache, teacher: Any, student: Any, mapping: VocabularyMap
) -> StudentVocabulary:
    aligner = _aligner(folder, teacher, student, rows=mapping.size)
    probe = RetokenisedRows(_Few(_first_rows(cache.source("heldout"))), aligner)
    loss_tokens, aligned = int(probe.loss_token_counts().sum()), int(probe.aligned_counts().sum())
    if not aligned:
        raise ModelError(
            f"{folder}: of {loss_tokens} supervised tokens of the student none begins where one of "
            "teacher's does",
            expected="tokenizers that give back the text that they are given",
            do="choose another student, or train on cross-entropy alone with --alpha 0",
        )
    share = aligned / loss_tokens
    _log.info(
        "across tokenizers: %.1f %% of the student's supervised tokens (%d of %d in the first "
        "held-out rows) begin where a token of the teacher does and have a target; the rest has "
        "cross-entropy alone; every row is now tokenised once to know its length",
        100 * share, aligned, loss_tokens,
    )  # fmt: skip
    return StudentVocabulary(
        cache,
        mapping.size,
        _student_files(student, teacher),
        sentence=f"another tokenizer than the teacher's; {100 * share:.1f} % of the supervised "
        "begin where one of the teacher's does",
        digest=vocabulary_fingerprint(student),
        wrap=lambda source: RetokenisedRows(source, aligner),
        retokenised=True,
    )


def _aligner(folder: Path, teacher: Any, student: Any, *, rows: int) -> Aligner:
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


@dataclass(frozen=True, slots=True)
class _Few:
    """A few rows as a source."""

    rows: Sequence[Any]

    def shard_rows(self) -> Sequence[int]:
        return [len(self.rows)]

    def lengths(self) -> Any:
        return np.asarray([len(row.input_ids_L) for row in self.rows], np.int32)

    def loss_token_counts(self) -> Any:
        return np.asarray([row.targets.num_positions for row in self.rows], np.int32)

    def shard_name(self, _shard: int) -> str:
        return "the first rows"

    def open(self, _shard: int) -> None:
        return

    def reading(self) -> Sequence[str]:
        return ()

    def read_rows(self, _shard: int, rows: Sequence[int]) -> list[Any]:
        return [self.rows[i] for i in rows]
