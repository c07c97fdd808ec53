"""The commands of rounds, as one would type them: what each reads, where it writes, in which order.

Arithmetic on names; nothing here starts a process or writes a file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.program import module_name
from stages.distill import trainer

__all__ = ["CORPUS", "Part", "RoundCommands", "RoundFolder", "Weights"]

CORPUS = "corpus"
"""The start that is a student of the corpus's own text; also the tag of that text."""
_AS_IT_IS = (
    "--student.keep_layers", "none", "--student.reconstruct", "none", "--student.revision", "none",
)  # fmt: skip
"""Flags for a student that is there already: no layers to prune or refit."""
_LEAST_WEIGHT = 1e-3
"""Text of earlier rounds with less than this share is not read at all."""


class Part(NamedTuple):
    """One command of the rounds."""

    title: str
    output: Path
    """The folder that it writes."""
    command: Sequence[str]
    config: str = ""
    """The configuration file that it reads."""
    check: Sequence[str] = ()
    """What finds mistakes with one process before a launcher starts several."""
    may_lack_rows: bool = False
    """Whether it may end well without rows that it has quarantined, as stage one does."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What else a round learns from, beside its own text, which has weight 1."""

    corpus: float
    earlier: float

    def of_round(self, number: int) -> dict[str, float]:
        """Return the weights of a round's caches by tag, its own first."""
        found = {round_name(number): 1.0}
        for age in range(1, number):
            weight = self.earlier**age
            if weight >= _LEAST_WEIGHT:
                found[round_name(number - age)] = weight
        if self.corpus:
            found[CORPUS] = self.corpus
        return found


@dataclass(frozen=True, slots=True)
class RoundFolder:
    """Where everything of one round is; round 0 is the student that writes first."""

    number: int
    root: Path
    model: str
    """The student after the round: a folder, or a hub id where round 0 trains nothing."""
    trained: bool = True
    """Whether the round trained it."""

    @property
    def name(self) -> str:
        """What the round is called."""
        return round_name(self.number)

    @property
    def cache(self) -> Path:
        """The teacher's distributions over what the student before wrote."""
        return self.root / "cache"

    @property
    def student(self) -> Path:
        """The output folder of its training."""
        return self.root / "student"

    @property
    def own_text(self) -> Path:
        """The teacher's distributions over what this student writes to the held-out prompts."""
        return self.root / "own-text"

    @property
    def scores(self) -> Path:
        """The scores of this student on its own text and on others."""
        return self.root / "scores"


def round_name(number: int) -> str:
    """Return the name of a round's folder."""
    return f"round-{number:02d}"


class RoundCommands:
    """The commands of all parts."""

    def __init__(
        self,
        root: Path,
        *,
        teacher_config: str,
        first_config: str,
        round_config: str,
        start: str,
        seed: int,
        weights: Weights,
        teacher_python: str,
        nproc: int,
    ) -> None:
        """Keep the parts; see `RoundsRun` for what they are."""
        self._root = root
        self._teacher_config = teacher_config
        self._first_config = first_config
        self._round_config = round_config
        self._start = start
        self._weights = weights
        self._nproc = nproc
        self._teacher = [teacher_python, "-m", module_name("stages.cache_teacher")]
        self._seed = seed

    @property
    def corpus(self) -> Path:
        """The cache of the corpus's own text."""
        return self._root / CORPUS

    @property
    def has_corpus(self) -> bool:
        """Whether anything is learned from the corpus's own text."""
        return self._start == CORPUS or bool(self._weights.corpus)

    def folders(self, rounds: int) -> list[RoundFolder]:
        """Return round 0 and the rounds up to a number."""
        trains = self._start == CORPUS
        found = []
        for number in range(rounds + 1):
            root = self._root / round_name(number)
            trained = bool(number) or trains
            model = str(root / "student" / "model") if trained else self._start
            found.append(RoundFolder(number, root, model, trained))
        return found

    def count(self, rounds: int) -> int:
        """Return the number of parts, the report included."""
        return len(list(self.all_parts(rounds))) + 1

    def all_parts(self, rounds: int) -> Iterator[Part]:
        """Yield every part in its order."""
        yield from self.before_rounds()
        for number in range(1, rounds + 1):
            yield from self.round(number)

    def before_rounds(self) -> Iterator[Part]:
        """Yield what comes before the first round: the student that writes in it."""
        (folder,) = self.folders(0)
        writing, scoring = self._scoring(folder)
        if not folder.trained:
            yield writing  # first, because it finds out at once whether that model can write
        if self.has_corpus:
            yield self._caching(
                "corpus: the teacher reads the corpus's own text",
                self.corpus,
                self._stage_one(self.corpus, "--generate.enabled", "false"),
            )
        if folder.trained:
            yield self._training(
                "first student: learns from the corpus's own text",
                folder.student,
                self._first_config,
                "--cache_dir", str(self.corpus),
            )  # fmt: skip
            yield writing
        yield scoring

    def round(self, number: int) -> Iterator[Part]:
        """Yield the parts of a round, from 1."""
        before, folder = self.folders(number)[-2:]
        yield self._caching(
            f"round {number}: the student writes, the teacher scores what it wrote",
            folder.cache,
            self.writing(folder.cache, before.model, seed=self._seed + number),
        )
        yield self._training(
            f"round {number}: the student learns from that",
            folder.student,
            self._round_config,
            "--cache_dir", self._mixture(number), "--student_model", before.model,
            *_AS_IT_IS,
        )  # fmt: skip
        yield from self._scoring(folder, written=True)

    def _caching(self, title: str, cache: Path, command: Sequence[str]) -> Part:
        return Part(title, cache, command, self._teacher_config, may_lack_rows=True)

    def _training(self, title: str, output: Path, config: str, *flags: str) -> Part:
        arguments = ["--config", config, *flags, "--output_dir", str(output)]
        # One process says what is wrong once; a launcher says it once a rank.
        check = [*trainer(1), *arguments, "--check"] if self._nproc > 1 else ()
        return Part(title, output, [*trainer(self._nproc), *arguments], config, check)

    def _scoring(self, folder: RoundFolder, *, written: bool = False) -> Iterator[Part]:
        """Yield what scores a student on its own text, the text it learned from, the corpus's."""
        whose = f"after round {folder.number}" if folder.number else "before the first round"
        writing = self.writing(folder.own_text, folder.model, seed=self._seed)
        yield self._caching(
            f"{whose}: the student's own text on the held-out prompts",
            folder.own_text,
            [*writing, "--generate.prompts", "heldout"],
        )
        caches = {"own": folder.own_text}
        if written:
            caches["written"] = folder.cache
        if self.has_corpus:
            caches[CORPUS] = self.corpus
        named = ",".join(f"{name}={path}" for name, path in caches.items())
        command = [
            sys.executable, "-m", module_name("stages.score_student"),
            "--student_model", folder.model, "--caches", named,
            "--scores", str(folder.scores / "scores.json"),
        ]  # fmt: skip
        yield Part(f"{whose}: the student's scores", folder.scores, command)

    def _stage_one(self, cache: Path, *flags: str) -> list[str]:
        return [
            *self._teacher, "--config", self._teacher_config, "--cache_dir", str(cache), *flags
        ]  # fmt: skip

    def writing(self, cache: Path, writer: str | None, *, seed: int) -> list[str]:
        """Return the command by which a model writes, and the teacher scores what it wrote.

        Args:
            cache: where the teacher's distributions go.
            writer: a model folder or hub id; None: the teacher itself.
            seed: of the draws.
        """
        return self._stage_one(
            cache,
            "--corpus.prepared", str(self._root / "prompts"),
            "--generate.enabled", "true",
            *(() if writer is None else ("--generate.writer", writer)),
            "--generate.seed", str(seed),
            "--generate.record_logprobs", "true",
        )  # fmt: skip

    def _mixture(self, number: int) -> str:
        """Return the value of `--cache_dir`: one address, or addresses with weights."""
        weights = self._weights.of_round(number)
        entries: list[dict[str, Any]] = []
        for tag, weight in weights.items():
            place = self.corpus if tag == CORPUS else self._root / tag / "cache"
            entries.append({"url": str(place), "weight": weight, "tag": tag})
        return str(entries[0]["url"]) if len(entries) == 1 else json.dumps(entries)
