"""A whole corpus in memory, for tests: what the prepared one, read unit by unit, has to equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.corpus.conclusion import conclude_samples
from pipeline.corpus.intake import Intake, TeacherTokens
from pipeline.corpus.prepared.heldout import Splitting
from pipeline.corpus.prepared.summary import CorpusSummary, SampleTotals, UnitReport
from pipeline.corpus.prompts import PromptIntake, PromptLimits, conclude_prompts
from pipeline.corpus.reading import open_reading
from pipeline.corpus.sample import CorpusCounts, Sample, SplitName
from pipeline.corpus.samples import Block, SampleIntake, prepare_unit
from pipeline.corpus.settings import CorpusSettings


class Samples(list[Sample]):
    """All samples in source order."""

    def of_split(self, split: str) -> Samples:
        """Return those of one split."""
        return Samples(sample for sample in self if sample.split == split)

    @property
    def num_tokens(self) -> int:
        """Tokens of all."""
        return sum(int(sample.input_ids.size) for sample in self)

    @property
    def num_loss_tokens(self) -> int:
        """Supervised tokens of all."""
        return sum(int(sample.loss_mask.sum()) for sample in self)


@dataclass(frozen=True)
class Corpus:
    """All samples, their counts and what they were read from."""

    samples: Samples
    counts: CorpusCounts
    identity: dict[str, Any]
    content: str
    end_of_turn: int | None = None
    """Of prompts: the token with which the chat template ends an answer."""


def build_corpus(
    settings: CorpusSettings, *, tokenizer: Any, seed: int, teacher: TeacherTokens | None = None
) -> Corpus:
    """Read, render and tokenise the corpus that `settings` describe."""
    intake = SampleIntake(
        settings, tokenizer, open_reading(settings), seed, teacher or TeacherTokens(),
        settings.add_eos,
    )  # fmt: skip
    samples, found = _read_whole(intake)
    return Corpus(samples, conclude_samples(found, intake), intake.identity(), found.report.content)


def build_prompts(
    settings: CorpusSettings,
    *,
    tokenizer: Any,
    seed: int,
    document_tokens: int,
    max_tokens: int,
) -> Corpus:
    """Read, render and tokenise the prompts of the corpus that `settings` describe."""
    intake = PromptIntake(
        settings, tokenizer, open_reading(settings, answered=False), seed, TeacherTokens(),
        add_eos=False, limits=PromptLimits(document_tokens, max_tokens),
    )  # fmt: skip
    samples, found = _read_whole(intake)
    counts = conclude_prompts(found, intake)
    return Corpus(samples, counts, intake.identity(), found.report.content, intake.end_of_turn())


def _read_whole(intake: Intake) -> tuple[Samples, CorpusSummary]:
    units = intake.reading.units(intake.settings)
    splitting, report = Splitting(intake.rule), UnitReport()
    blocks: list[tuple[int, Block, frozenset[int]]] = []
    rows: list[list[Any]] = []
    for unit in units:
        before = report.rows

        def write(_: int, block: Block, before: int = before) -> None:
            blocks.append((before, block, splitting.add(block.summary).heldout))
            rows.append(sorted([*block.train, *block.candidates], key=lambda r: (r.row, r.part)))

        report.add(prepare_unit(intake, unit, write=write, is_last=unit is units[-1]).report)
    moved = {number: {row.row for row in held} for number, held in splitting.moved().items()}
    samples = Samples()
    for number, (before, _, heldout) in enumerate(blocks):
        held = heldout | moved.get(number, set())
        for row in rows[number]:
            split: SplitName = "heldout" if row.row in held else "train"
            samples.append(row.sample(split, before))
    totals = [
        SampleTotals(len(part), part.num_tokens, part.num_loss_tokens)
        for part in (samples.of_split("train"), samples.of_split("heldout"))
    ]
    num_moved = sum(map(len, moved.values()))
    found = CorpusSummary(
        report, splitting.rows, splitting.heldout + num_moved, num_moved, totals[0], totals[1]
    )
    return samples, found
