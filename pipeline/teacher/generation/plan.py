"""What the teacher is to write: prompts cut into shards, a request for each response, its samples.

Arithmetic on prompts; nothing here loads a model or writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.corpus import Corpus
from pipeline.corpus.intake import TeacherTokens
from pipeline.corpus.prompts import Prompt, Prompts, build_prompts
from pipeline.corpus.sample import CorpusCounts, Sample
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.split import response_id, response_seed
from pipeline.corpus.table import SampleTable
from pipeline.storage import Store
from pipeline.teacher.engines.base import Teacher
from pipeline.teacher.generation.base import WriteRequest
from pipeline.teacher.generation.files import response_file
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.settings import CaptureSettings

__all__ = ["ResponsePlan", "ResponseShard", "WritingTask", "plan_responses"]

_REAL_SAMPLES = 64
"""Samples of the upper bound that hold tokens: what a timing run takes."""


@dataclass(frozen=True, slots=True)
class ResponseShard:
    """Prompts that are answered in one call, all their responses together."""

    index: int
    prompts: tuple[Prompt, ...]

    @property
    def name(self) -> str:
        """The shard's name in leases and logs; no shard of a split is called so."""
        return f"responses-{self.index:05d}"

    @property
    def file(self) -> str:
        """The path of its file inside the cache."""
        return response_file(self.index)

    @property
    def file_name(self) -> str:
        """Its file among the others."""
        return self.file.rsplit("/", 1)[-1]

    def is_done(self, store: Store) -> bool:
        """Return whether its file is there."""
        return store.exists(self.file)


@dataclass(frozen=True, slots=True)
class ResponsePlan:
    """All responses that a cache is to be made from."""

    prompts: Prompts
    settings: GenerateSettings
    ends: tuple[int, ...]
    """Tokens after which a response is over, ascending."""
    seed: int
    """The run's seed."""
    vocabulary: int
    """One more than the largest id that has a text; a padded head has more rows."""

    @property
    def total(self) -> int:
        """Responses of all prompts."""
        return len(self.prompts.prompts) * self.settings.responses

    @property
    def most_tokens(self) -> int:
        """Tokens that are written if every response runs to its limit."""
        return self.total * self.settings.max_new_tokens

    def shards(self) -> list[ResponseShard]:
        """Cut the prompts, in the corpus's order."""
        size, prompts = self.settings.shard_prompts, self.prompts.prompts
        return [
            ResponseShard(index, tuple(prompts[start : start + size]))
            for index, start in enumerate(range(0, len(prompts), size))
        ]

    def requests(self, prompts: Sequence[Prompt]) -> list[WriteRequest]:
        """Return one request per response, all of a prompt side by side."""
        return [
            WriteRequest(name, prompt.input_ids, response_seed(self.seed, name))
            for prompt, names in self._named(prompts)
            for name in names
        ]

    def identity(self) -> dict[str, Any]:
        """Describe the corpus as far as it is known before a response is written."""
        return {
            **self.prompts.identity,
            "generate": {**self.settings.identity(), "end_tokens": list(self.ends)},
        }

    def corpus(self, responses_RN: Sequence[NDArray[np.int32]]) -> Corpus:
        """Return the samples: prompt and response, of which the response's tokens count.

        Args:
            responses_RN: the sampled tokens of every response, in the order of `requests`; empty
                where there is none: such a prompt is no sample.
        """
        samples: list[Sample] = []
        content = hashlib.blake2b(digest_size=16)
        unfinished = 0
        written = iter(responses_RN)
        for prompt, names in self._named(self.prompts.prompts):
            for number, name in enumerate(names):
                ids_N = next(written)
                content.update(name.encode() + ids_N.astype("<i4").tobytes())
                if not ids_N.size:
                    continue
                unfinished += int(ids_N[-1]) not in self.ends
                samples.append(_sample(prompt, name, number, ids_N))
        identity = self.identity() | {
            "responses": {
                "count": len(samples),
                "tokens": sum(int(ids_N.size) for ids_N in responses_RN),
                "unfinished": unfinished,
                "blake2b": content.hexdigest(),
            }
        }
        tokens = sum(int(ids_N.size) for ids_N in responses_RN)
        counts = self._counts(samples, tokens)
        return Corpus(SampleTable.of(samples), counts, identity, content.hexdigest())

    def upper_bound(self) -> Corpus:
        """Return a corpus in which every response runs to its limit: for estimates only."""
        limit = self.settings.max_new_tokens
        samples: list[Sample] = []
        for prompt, names in self._named(self.prompts.prompts):
            for number, name in enumerate(names):
                if len(samples) < _REAL_SAMPLES:
                    ids_N = np.full(limit, prompt.input_ids[-1], np.int32)
                    samples.append(_sample(prompt, name, number, ids_N))
                    continue
                length = prompt.input_ids.size + limit
                ids_L = np.broadcast_to(np.int32(0), (length,))
                loss_mask_L = np.broadcast_to(np.True_, (length,))
                samples.append(
                    Sample(name, prompt.split, ids_L, loss_mask_L, prompt.source_index, number)
                )
        counts = self._counts(samples, len(samples) * limit)
        return Corpus(SampleTable.of(samples), counts, self.identity())

    def _named(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, list[str]]]:
        for prompt in prompts:
            numbers = range(self.settings.responses)
            yield prompt, [response_id(prompt.prompt_id, number) for number in numbers]

    def _counts(self, samples: Sequence[Sample], loss_tokens: int) -> CorpusCounts:
        train = sum(sample.split == "train" for sample in samples)
        return replace(
            self.prompts.counts,
            samples=len(samples),
            train=train,
            heldout=len(samples) - train,
            tokens=sum(int(sample.input_ids.size) for sample in samples),
            loss_tokens=loss_tokens,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the numbers of the plan, for its file."""
        return {
            "prompts": len(self.prompts.prompts),
            "responses": self.total,
            "shards": len(self.shards()),
            "prompt_counts": asdict(self.prompts.counts),
        }


@dataclass(frozen=True, slots=True)
class WritingTask:
    """What the teacher writes, and for which cache."""

    teacher: Teacher
    plan: ResponsePlan
    settings: CaptureSettings
    """How long leases last, and how many rows may fail."""
    identity: dict[str, Any]
    """The cache's, as far as it is known before a response is written."""


def plan_responses(
    corpus: CorpusSettings,
    generate: GenerateSettings,
    *,
    tokenizer: Any,
    seed: int,
    teacher: TeacherTokens,
) -> ResponsePlan:
    """Build the prompts and find the tokens that end a response.

    Raises:
        CorpusError: as `build_prompts` says.
    """
    prompts = build_prompts(
        corpus,
        tokenizer=tokenizer,
        seed=seed,
        teacher=teacher,
        document_tokens=generate.prompt_tokens,
        max_tokens=corpus.max_length - generate.max_new_tokens,
    )
    # A base model's files often lack the token with which the template ends a turn.
    ends = {*teacher.end_tokens}
    if prompts.end_of_turn is not None:
        ends.add(prompts.end_of_turn)
    vocabulary = int(max(tokenizer.get_vocab().values())) + 1
    return ResponsePlan(prompts, generate, tuple(sorted(ends)), seed, vocabulary)


def _sample(prompt: Prompt, name: str, number: int, ids_N: NDArray[np.int32]) -> Sample:
    loss_mask_L = np.zeros(prompt.input_ids.size + ids_N.size, np.bool_)
    loss_mask_L[prompt.input_ids.size :] = True
    ids_L = np.concatenate([prompt.input_ids, ids_N]).astype(np.int32)
    return Sample(name, prompt.split, ids_L, loss_mask_L, prompt.source_index, number)
