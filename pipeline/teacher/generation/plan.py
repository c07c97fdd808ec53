"""What is to be written: a request for each response to a prompt, and the sizes of it all.

Arithmetic on prompts; nothing here loads a model or writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.intake import TeacherTokens
from pipeline.corpus.prepared.summary import SampleTotals
from pipeline.corpus.prompts import PromptIntake
from pipeline.corpus.sample import CorpusCounts, Sample
from pipeline.corpus.split import response_id, response_seed
from pipeline.teacher.capture.plan import PlannedShard
from pipeline.teacher.engines.base import Teacher
from pipeline.teacher.generation.base import WriteRequest
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.generation.shards import PromptShards
from pipeline.teacher.settings import CaptureSettings
from pipeline.teacher.writer import Writer

__all__ = ["ResponsePlan", "UpperBound", "WritingTask", "plan_responses", "response_sample"]


@dataclass(frozen=True, slots=True)
class ResponsePlan:
    """How prompts are answered."""

    settings: GenerateSettings
    ends: tuple[int, ...]
    """Tokens after which a response is over, ascending."""
    seed: int
    """Of the draws."""
    vocabulary: int
    """One more than the largest id that has a text; a padded head has more rows."""
    prompt_identity: dict[str, Any]
    """Equal for equal prompts, except that the caller adds the tokenizer."""
    writer_identity: dict[str, Any] = field(default_factory=dict)
    """Who writes; empty: the teacher."""

    def names(self, prompt: Sample) -> list[str]:
        """Return the ids of a prompt's responses."""
        return [response_id(prompt.sample_id, n) for n in range(self.settings.responses)]

    def requests(self, prompts: Sequence[Sample]) -> list[WriteRequest]:
        """Return one request per response, all of a prompt side by side."""
        return [
            WriteRequest(name, prompt.input_ids, response_seed(self.seed, name))
            for prompt in prompts
            for name in self.names(prompt)
        ]

    def identity(self) -> dict[str, Any]:
        """Describe the corpus: what it holds is known by its content, once it is written."""
        return {
            **self.prompt_identity,
            "generate": {
                **self.settings.identity(),
                **self.writer_identity,
                "end_tokens": list(self.ends),
            },
        }

    def upper_bound(self, prompts: SampleTotals) -> SampleTotals:
        """Return the sums over all samples if every response runs to its limit."""
        samples = prompts.samples * self.settings.responses
        written = samples * self.settings.max_new_tokens
        return SampleTotals(samples, prompts.tokens * self.settings.responses + written, written)


@dataclass(frozen=True, slots=True)
class WritingTask:
    """What is written, by whom, and for which cache."""

    teacher: Teacher
    writer: Writer
    plan: ResponsePlan
    prompts: PromptShards
    settings: CaptureSettings
    """How long leases last, and how many rows may fail."""
    identity: dict[str, Any]
    """The cache's, as far as it is known before the teacher is asked anything."""


@dataclass(frozen=True, slots=True)
class UpperBound:
    """A corpus in which every response runs to its limit; satisfies `ShardSource`, for estimates.

    None of its shards is known before the responses are.
    """

    plan: ResponsePlan
    prompts: PromptShards

    def refresh(self) -> None:
        """Look for more prompts."""
        self.prompts.refresh()

    @property
    def is_complete(self) -> bool:
        """Whether all prompts are known, and with them the bound."""
        return self.prompts.is_complete

    @property
    def shards(self) -> Sequence[PlannedShard]:
        """None."""
        return ()

    def projected(self) -> SampleTotals:
        """Return the sums."""
        return self.plan.upper_bound(self.prompts.projected())

    def counts(self) -> CorpusCounts:
        """Return the counts of a complete corpus."""
        found, each, bound = self.prompts.counts(), self.plan.settings.responses, self.projected()
        return replace(
            found,
            samples=bound.samples,
            train=found.train * each,
            heldout=found.heldout * each,
            tokens=bound.tokens,
            loss_tokens=bound.loss_tokens,
        )

    @property
    def content(self) -> str:
        """Nothing is written yet."""
        return ""

    def first_samples(self) -> Iterator[Sample]:
        """Make samples from the first prompts: what a timing run takes."""
        for prompt in self.prompts.first_prompts():
            ids_N = np.full(self.plan.settings.max_new_tokens, prompt.input_ids[-1], np.int32)
            yield response_sample(prompt, prompt.sample_id, 0, ids_N)


def plan_responses(
    generate: GenerateSettings,
    *,
    tokenizer: Any,
    seed: int,
    teacher: TeacherTokens,
    writer: Writer,
    intake: PromptIntake,
) -> ResponsePlan:
    """Find the tokens that end a response, and what else decides the responses."""
    # A base model's files often lack the token with which the template ends a turn.
    end_of_turn = intake.end_of_turn()
    own = [] if end_of_turn is None else [end_of_turn]
    ends = {*teacher.end_tokens, *writer.end_tokens, *own}
    vocabulary = int(max(tokenizer.get_vocab().values())) + 1
    return ResponsePlan(
        generate,
        tuple(sorted(ends)),
        seed if generate.seed is None else generate.seed,
        vocabulary,
        intake.identity(),
        writer.identity(),
    )


def response_sample(prompt: Sample, name: str, number: int, ids_N: NDArray[np.int32]) -> Sample:
    """Return prompt and response, of which the response's tokens are supervised."""
    loss_mask_L = np.zeros(prompt.input_ids.size + ids_N.size, np.bool_)
    loss_mask_L[prompt.input_ids.size :] = True
    ids_L = np.concatenate([prompt.input_ids, ids_N]).astype(np.int32)
    return Sample(name, prompt.split, ids_L, loss_mask_L, prompt.source_index, number)
