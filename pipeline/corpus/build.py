"""Build a corpus: read rows, render, tokenise, limit their length, identify and split them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.corpus.chat.conversation import Conversation
from pipeline.corpus.chat.formats import Interpreter
from pipeline.corpus.chat.rendering.render import ChatRenderer, Rendered
from pipeline.corpus.chat.rendering.tokenise import Tokens
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.intake import AcceptedRow, Intake, TeacherTokens
from pipeline.corpus.reading import Progress, open_reading
from pipeline.corpus.sample import CorpusCounts, Sample
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources.rows import Row
from pipeline.corpus.split import sample_id
from pipeline.corpus.table import SampleTable, SampleWriter
from pipeline.errors import CorpusError

__all__ = ["Progress", "build_corpus"]

_log = logging.getLogger(__name__)


def build_corpus(
    settings: CorpusSettings,
    *,
    tokenizer: Any,
    seed: int,
    teacher: TeacherTokens | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Read, render and tokenise the corpus that `settings` describe.

    Args:
        settings: the corpus section of the configuration.
        tokenizer: a fast tokenizer of transformers.
        seed: decides, with each row's identity, which rows are held out.
        teacher: its end tokens and the size of its embedding, where they are known.
        progress: called after each batch of rows.

    Raises:
        CorpusError: the corpus cannot be reached or read, is empty, fits no format, or has more
            bad rows than the settings allow.
    """
    reading = open_reading(settings)
    work = _Work(
        settings, tokenizer, reading.source, seed, teacher or TeacherTokens(), settings.add_eos
    )
    for batch in reading.batches:
        work.add(batch, reading.interpret)
        if progress is not None:
            progress(work.rows, reading.total)
    return work.finish(reading.format_name)


@dataclass(slots=True)
class _Work(Intake):
    samples: SampleWriter = field(default_factory=SampleWriter)

    def used(self, conversation: Conversation) -> Conversation:
        return conversation

    def described(self, conversation: Conversation) -> list[Any]:
        chat = conversation
        return [
            chat.messages, chat.first_supervised, chat.tools, sorted(chat.developer),
            sorted(chat.unsupervised), chat.unfinished, chat.answer_prefix,
        ]  # fmt: skip

    def rendered(self, renderer: ChatRenderer, conversation: Conversation, row: Row) -> Rendered:
        return renderer.render(conversation, row.place)

    def add(self, batch: list[Row], interpret: Interpreter) -> None:
        """Process the next rows of the source."""
        for taken in self.take(batch, interpret):
            kept = [self._keep(taken, part, piece) for part, piece in self._cut(taken.tokens)]
            if any(kept):
                self.small.add(taken.row.key, taken.index, taken.split)

    def _cut(self, tokens: Tokens) -> Iterator[tuple[int, Tokens]]:
        limit, length = self.settings.max_length, len(tokens.input_ids)
        if length <= limit:
            yield 0, tokens
        elif self.settings.overlong == "drop":
            self.count("dropped_overlong")
        elif self.settings.overlong == "truncate":
            self.count("truncated_rows")
            self.count("tokens_cut", length - limit)
            yield 0, Tokens(tokens.input_ids[:limit], tokens.loss_mask[:limit])
        else:
            self.count("split_rows")
            for part, start in enumerate(range(0, length, limit)):
                self.count("split_parts")
                piece = slice(start, start + limit)
                yield part, Tokens(tokens.input_ids[piece], tokens.loss_mask[piece])

    def _keep(self, taken: AcceptedRow, part: int, piece: Tokens) -> bool:
        """Write a sample; return whether it has a supervised token."""
        loss_mask = piece.loss_mask.copy()
        loss_mask[:1] = False
        if not loss_mask.any():
            self.count("dropped_no_labels")
            return False
        name = sample_id(self.source.name, taken.row.key, part)
        self.samples.append(
            Sample(name, taken.split, piece.input_ids, loss_mask, taken.index, part)
        )
        return True

    def finish(self, format_name: str) -> Corpus:
        """Log the counts and return the corpus."""
        self.close()
        samples = self._split(self.small.moved())
        counts = self._counts()
        name = self.settings.dataset_name
        if not counts.samples:
            raise CorpusError(
                f"{name}: none of its {self.rows} rows gave a sample ({self._losses(counts)})",
                expected="at least one sequence with a supervised token",
                do="check --corpus.format, --corpus.loss_on and --max_length" + self.bad.besides(),
            )
        if not counts.train:
            raise CorpusError(
                f"{name}: all of its {counts.samples} samples are held out",
                expected="samples to train on",
                do="read more rows, or lower --corpus.heldout_fraction" + self.bad.besides(),
            )
        self._report(counts)
        return Corpus(samples, counts, self._whole_identity(format_name))

    def _split(self, moved: frozenset[int]) -> SampleTable:
        """Return the samples, those of the rows `moved` held out."""
        table = self.samples.finish()
        if not moved:
            return table
        self.samples = SampleWriter()
        for sample in table:
            held = sample.source_index in moved
            self.samples.append(replace(sample, split="heldout") if held else sample)
        return self.samples.finish()

    def _counts(self) -> CorpusCounts:
        train, heldout = map(self.samples.num_samples, ("train", "heldout"))
        names = (
            "truncated_rows", "tokens_cut", "split_rows", "split_parts",
            "dropped_no_labels", "dropped_overlong",
        )  # fmt: skip
        return CorpusCounts(
            rows=self.rows,
            samples=train + heldout,
            train=train,
            heldout=heldout,
            tokens=self.samples.num_tokens,
            loss_tokens=self.samples.num_loss_tokens,
            quarantined=self.bad.count,
            **{name: self.tally.get(name, 0) for name in names},
        )

    def _losses(self, counts: CorpusCounts) -> str:
        return (
            f"{counts.dropped_no_labels} without a supervised token, "
            f"{counts.dropped_overlong} longer than {self.settings.max_length} tokens"
        )

    def _report(self, counts: CorpusCounts) -> None:
        _log.info(
            "corpus %s: %d rows -> %d samples (%d train, %d held out), %d tokens, %d "
            "supervised",
            self.settings.dataset_name, counts.rows, counts.samples, counts.train, counts.heldout,
            counts.tokens, counts.loss_tokens,
        )  # fmt: skip
        if counts.truncated_rows:
            _log.warning(
                "%d rows were longer than max_length %d: truncated, %d tokens cut off",
                counts.truncated_rows, self.settings.max_length, counts.tokens_cut,
            )  # fmt: skip
        if counts.split_rows:
            _log.info("%d long rows became %d parts", counts.split_rows, counts.split_parts)
        if counts.dropped_no_labels or counts.dropped_overlong:
            _log.warning("samples left out: %s", self._losses(counts))
        wanted = self.settings.heldout_samples
        held = self.small.heldout + len(self.small.moved())
        if wanted is not None and held < wanted:
            _log.warning(
                "only %d of at most %d rows are held out: heldout_fraction %g picked no more",
                held, wanted, self.settings.heldout_fraction,
            )  # fmt: skip
        elif not counts.heldout:
            _log.warning("no sample is held out: nothing to evaluate on")

    def _whole_identity(self, format_name: str) -> dict[str, Any]:
        identity = self.identity(format_name, "rows_blake2b")
        names = ("loss_on", "add_eos", "supervise_empty")
        return {**identity, **{name: getattr(self.settings, name) for name in names}}
