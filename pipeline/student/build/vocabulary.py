"""The student's vocabulary against the cache's: the same, mapped by content, or another tokenizer.

Decided once, before anything is loaded; what follows from it (rows in the student's ids, rows of
the head in use, tokenizer of the exported student) is asked from here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.io.reader import Cache
from pipeline.data.mapped import MappedRows
from pipeline.data.order.totals import SplitTotals, split_totals
from pipeline.data.retokenise import RetokenisedRows, retokenise
from pipeline.data.source import RowSource
from pipeline.errors import ModelError
from pipeline.loss.settings import CrossTokenizer
from pipeline.models.resolve import read_model_config
from pipeline.models.tokenizer import (
    load_tokenizer,
    tokenizer_files,
    tokenizer_from_files,
    vocabulary_difference,
    vocabulary_fingerprint,
)
from pipeline.models.vocabulary import VocabularyMap, first_disagreement, map_vocabulary
from pipeline.student.build.aligner import make_aligner
from pipeline.student.build.student_sizes import SizeCounter

__all__ = ["StudentVocabulary", "open_vocabulary"]

_log = logging.getLogger(__name__)
_PROBE_ROWS = 64


@dataclass(frozen=True)
class StudentVocabulary:
    """How the student's tokens relate to the cache's."""

    cache: Cache
    size: int
    """Rows of the head in use; those from here on are padding and get no mass."""
    files: Mapping[str, bytes]
    """Tokenizer files of the exported student."""
    sentence: str = ""
    """For the card; empty where the vocabularies are the same."""
    digest: str | None = None
    """What decides the student's rows; None where they are the cache's own."""
    wrap: Callable[[RowSource, str], RowSource] | None = None
    """Rows of a split in the cache's tokens to those in the student's."""
    retokenised: bool = False
    lacked: Callable[[NDArray[np.int32]], list[str]] | None = None
    """Returns the pieces of the cache's ids that the student cannot be fed; None: it has all."""
    rows: RowSource | None = None
    """The training rows in the cache's tokens; None: all of them, with all entries."""

    @cached_property
    def train(self) -> RowSource:
        """The training rows in the student's tokens."""
        return self._rows("train")

    @cached_property
    def heldout(self) -> RowSource:
        """The held-out rows in the student's tokens."""
        return self._rows("heldout")

    @cached_property
    def totals(self) -> SplitTotals:
        """Of the training rows."""
        return split_totals(self.train)

    def pack_length(self) -> int:
        """Return the tokens of the longest sequence that there can be."""
        longest = int(self.cache.manifest.identity["corpus"]["max_length"])
        if not self.retokenised:
            return longest
        return max(longest, self.totals.longest)

    def _rows(self, split: str) -> RowSource:
        source = self.rows if split == "train" else None
        source = source or self.cache.source(split)
        return self.wrap(source, split) if self.wrap is not None else source


def open_vocabulary(
    student_folder: Path,
    cache: Cache,
    *,
    cross_tokenizer: CrossTokenizer,
    train: RowSource | None = None,
) -> StudentVocabulary:
    """Compare the student's tokenizer with the cache's, by content.

    - The same pieces under the same ids: nothing to do.
    - The same pieces under other ids, or some on one side alone, and text that both split alike:
      ids are mapped, and what maps is logged.
    - Anything else is another tokenizer: rejected, unless `cross_tokenizer` says how to train
      across it.

    Args:
        student_folder: of the model that the student starts from.
        cache: the cache.
        cross_tokenizer: what to do about another tokenizer.
        train: the training rows to read; None: all of the cache, with all
            entries.

    Raises:
        ModelError: another tokenizer, one without what the mode needs, or a head with fewer rows
            than the student's tokenizer has ids.
    """
    cache_files = cache.tokenizer_files()
    teacher, student = tokenizer_from_files(cache_files), load_tokenizer(student_folder)
    wanted, found = teacher.get_vocab(), student.get_vocab()
    mapping = map_vocabulary(wanted, found, head_rows=_head_rows(student_folder, found))
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

    def piece(number: int) -> str:
        return str(teacher.convert_ids_to_tokens(number))

    def lacked(ids: NDArray[np.int32]) -> list[str]:
        different = np.unique(ids)
        return [piece(int(i)) for i in different[mapping.apply(different) >= mapping.size]]

    return StudentVocabulary(
        cache,
        mapping.size,
        _student_files(student, teacher),
        sentence=f"mapped by content: {mapping.report()}",
        digest=vocabulary_fingerprint(student),
        wrap=lambda source, _: MappedRows(source, mapping.apply, mapping.size, piece),
        lacked=lacked if mapping.missing else None,
        rows=train,
    )


def _head_rows(folder: Path, tokens: Mapping[str, int]) -> int:
    """Return the rows of the student's head, which may be padded beyond its tokenizer.

    Raises:
        ModelError: fewer than its tokenizer has ids, or no number of them.
    """
    config = read_model_config(folder)
    rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(rows, int):
        raise ModelError(
            f"{folder}: config.json gives no size of the vocabulary", expected="vocab_size"
        )
    highest = max(tokens, key=tokens.__getitem__, default="")
    if tokens and tokens[highest] >= rows:
        raise ModelError(
            f"{folder}: its tokenizer gives token {tokens[highest]} ({highest!r}), its head has "
            f"{rows} rows",
            expected="a row of embedding and head for each token",
            do="resize the student's embeddings to its tokenizer first "
            f"(model.resize_token_embeddings({tokens[highest] + 1}))",
        )
    return rows


def _problem(cache: Cache, teacher: Any, student: Any, mapping: VocabularyMap) -> str | None:
    """Return why pieces cannot simply be mapped; None where they can."""
    if not mapping.same + mapping.moved:
        return "they share no piece"
    texts = []
    for row in _first_rows(cache):
        ids = row.input_ids_L
        if (mapping.apply(ids) >= mapping.size).any():
            unknown = ids[mapping.apply(ids) >= mapping.size]
            piece = teacher.convert_ids_to_tokens(int(unknown[0]))
            return f"the cache's sequences hold {piece!r}, which it lacks"
        texts.append(teacher.decode(ids.tolist()))
    return first_disagreement(teacher, student, mapping, texts)


def _first_rows(cache: Cache) -> list[Any]:
    """Return a few rows to try tokenizers on: held-out ones where there are any."""
    split = "heldout" if cache.manifest.of_split("heldout") else "train"
    source = cache.source(split)
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
    aligner = make_aligner(folder, teacher, student, rows=mapping.size)
    counter = SizeCounter(cache, folder, mapping.size, aligner)
    targets = [retokenise(row, aligner).targets for row in _first_rows(cache)]
    loss_tokens = sum(target.num_positions for target in targets)
    aligned = sum(int((target.counts_N > 0).sum()) for target in targets)
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
        "rows) begin where a token of the teacher does and have a target; the rest has "
        "cross-entropy alone; every row is tokenised once to know its length, and never again",
        100 * share, aligned, loss_tokens,
    )  # fmt: skip
    return StudentVocabulary(
        cache,
        mapping.size,
        _student_files(student, teacher),
        sentence=f"another tokenizer than the teacher's; {100 * share:.1f} % of the supervised "
        "begin where one of the teacher's does",
        digest=vocabulary_fingerprint(student),
        wrap=lambda source, split: RetokenisedRows(source, aligner, counter.sizes(split)),
        retokenised=True,
    )
