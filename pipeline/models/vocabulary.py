"""Compare two vocabularies: map ids by content, and check that text is tokenised alike.

V: ids of the teacher's tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["VocabularyMap", "first_disagreement", "map_vocabulary"]

_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class VocabularyMap:
    """The student's id for each of the teacher's, by the piece that both denote."""

    student_ids_V: NDArray[np.int64]
    """`size` plus the teacher's id where the student has no such piece: outside its vocabulary, but
    distinct, so that the mass of each is kept."""
    size: int
    """Ids of the student from here on have no piece."""
    same: int
    """Pieces under the same id."""
    moved: int
    """Pieces under another id."""
    missing: tuple[str, ...]
    """Pieces of the teacher that the student does not have."""
    extra: tuple[str, ...]
    """Pieces of the student that the teacher does not have."""

    @property
    def is_identity(self) -> bool:
        """Whether all ids are equal and no piece is missing on either side."""
        return not (self.moved or self.missing or self.extra)

    def apply(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the student's ids; ids without a piece (padding of a head) map outside."""
        mapped = self.size + ids.astype(np.int64)
        known = ids < len(self.student_ids_V)
        mapped[known] = self.student_ids_V[ids[known]]
        return mapped.astype(np.int32)

    def report(self) -> str:
        """Describe the mapping in one line."""
        parts = [f"{self.same} pieces keep their id", f"{self.moved} are under another id"]
        for what, pieces in (
            ("are the teacher's alone (their mass counts as outside the student's vocabulary)",
             self.missing),
            ("are the student's alone", self.extra),
        ):  # fmt: skip
            if pieces:
                shown = ", ".join(repr(piece) for piece in pieces[:_EXAMPLES])
                more = ", ..." if len(pieces) > _EXAMPLES else ""
                parts.append(f"{len(pieces)} {what}: {shown}{more}")
        return "; ".join(parts)


def map_vocabulary(
    teacher: Mapping[str, int], student: Mapping[str, int], *, head_rows: int
) -> VocabularyMap:
    """Map by content.

    Args:
        teacher: id of each piece, added tokens included.
        student: likewise.
        head_rows: of the student; a piece whose id has no row cannot be fed or predicted.
    """
    usable = {piece: number for piece, number in student.items() if number < head_rows}
    size = max(usable.values(), default=-1) + 1
    highest = max(teacher.values(), default=-1) + 1
    student_ids_V = size + np.arange(highest, dtype=np.int64)
    same = moved = 0
    missing = []
    for piece, number in sorted(teacher.items(), key=lambda item: item[1]):
        found = usable.get(piece)
        if found is None:
            missing.append(piece)
            continue
        student_ids_V[number] = found
        same += found == number
        moved += found != number
    extra = sorted(usable.keys() - teacher.keys(), key=usable.__getitem__)
    return VocabularyMap(student_ids_V, size, same, moved, tuple(missing), tuple(extra))


def first_disagreement(
    teacher: Any, student: Any, mapping: VocabularyMap, texts: Sequence[str]
) -> str | None:
    """Describe where the two tokenise a text differently; None where they agree on all.

    Equal pieces are not enough: with other merges the student would read sequences that its
    tokenizer never produces. Both tokenise the same text, so what decoding loses does not matter.

    Args:
        teacher: its tokenizer.
        student: likewise.
        mapping: between the two.
        texts: decoded rows of the cache.
    """
    for text in texts:
        ours = teacher(text, add_special_tokens=False).input_ids
        theirs = student(text, add_special_tokens=False).input_ids
        mapped = mapping.apply(np.asarray(ours, np.int32)).tolist()
        if mapped == theirs:
            continue
        # The first place where they differ.
        at = next(
            (i for i, (a, b) in enumerate(zip(mapped, theirs, strict=False)) if a != b),
            min(len(mapped), len(theirs)),
        )
        left = teacher.convert_ids_to_tokens(ours[at : at + _EXAMPLES])
        right = student.convert_ids_to_tokens(theirs[at : at + _EXAMPLES])
        return f"where the cache has {left}, the student's has {right}"
    return None
