"""Settings of responses that a model writes, the teacher or a student; imports nothing heavy."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from pipeline.config import Settings, option

__all__ = ["GenerateSettings", "mistakes_with_corpus"]


class GenerateSettings(Settings):
    """Whether a model writes the responses, which one, and how they are drawn."""

    enabled: bool = option(
        False,
        "let the teacher (or generate.writer) answer the prompts of the corpus and cache the "
        "teacher's distributions over what was written; the corpus's own last answers are not used",
    )
    writer: str | None = option(
        None,
        "who writes: a hub id or a model folder with the teacher's vocabulary, such as the student "
        "of an earlier run; none: the teacher",
    )
    writer_revision: str | None = option(None, "branch, tag or commit of a writer's hub id")
    writer_parallel_size: int = option(
        1, "vLLM only: GPUs that share one writer that is not the teacher", ge=1, le=64
    )
    prompts: Literal["all", "heldout"] = option(
        "all",
        "which prompts are answered; `heldout` makes a cache to score students on, and nothing to "
        "train on",
    )
    seed: int | None = option(
        None,
        "of the draws; none: the run's seed. Another seed draws other responses to the same "
        "prompts, of the same held-out split",
        ge=0,
    )
    temperature: float = option(1.0, "divides the logits; 0 always takes the likeliest", ge=0, le=5)
    top_p: float = option(1.0, "draw from the likeliest tokens that hold this mass", gt=0, le=1)
    top_k: int = option(0, "draw from this many likeliest tokens; 0 for all", ge=0)
    min_p: float = option(
        0.0, "leave out tokens less likely than this share of the likeliest", ge=0, le=1
    )
    max_new_tokens: int = option(512, "tokens of the longest response", ge=1)
    responses: int = option(1, "responses to each prompt", ge=1, le=10_000)
    prompt_tokens: int = option(
        32, "plain documents: so many of their first tokens are the prompt", ge=1
    )
    shard_prompts: int = option(
        1024,
        "prompts that a worker answers in one call; what is lost when it is killed, and where the "
        "last long answer leaves the device idle",
        ge=1,
        le=1 << 20,
    )
    record_logprobs: bool = option(
        False,
        "keep the writer's log-prob of each token it drew (temperature 1, nothing left out), in "
        "the files of responses and in the cache, where it tells how far a student has moved since",
    )

    record_top_k: int = option(
        0,
        "keep this many ids that the writer itself finds likeliest at each token it writes; the "
        "teacher's log-probs of them are entries known exactly, so that reverse KL is exact where "
        "the writer has its mass (0: none)",
        ge=0,
        le=255,
    )

    @model_validator(mode="after")
    def _draws_make_sense(self) -> Self:
        mistakes = []
        if 0 < self.temperature < 0.01:
            mistakes.append(
                f"generate.temperature: found {self.temperature}, expected 0 or at least 0.01 "
                "(below, vLLM takes 0.01)"
            )
        if self.writer is None:
            mistakes += [
                f"generate.{name}: found {value} without generate.writer, expected both or neither"
                for name, value, usual in (
                    ("writer_revision", self.writer_revision, None),
                    ("writer_parallel_size", self.writer_parallel_size, 1),
                )
                if value != usual
            ]
        if self.temperature == 0 and self.responses > 1:
            mistakes.append(
                f"generate.responses: found {self.responses} at temperature 0, expected 1: all "
                "would be the same"
            )
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def identity(self) -> dict[str, Any]:
        """Return what decides the tokens, for the cache's identity.

        `shard_prompts` is part of it: the sequences computed together decide the last bits of the
        logits, and now and then a token.
        """
        unnamed = {"enabled", "writer", "writer_revision", "writer_parallel_size"}
        # What is as ever is not named, so that it is the same cache as ever.
        unnamed |= {"prompts"} if self.prompts == "all" else set()
        unnamed |= {"seed"} if self.seed is None else set()
        unnamed |= {"record_top_k"} if not self.record_top_k else set()
        return self.model_dump(exclude=unnamed)


def mistakes_with_corpus(
    generate: GenerateSettings, max_length: int | None, overlong: str
) -> list[str]:
    """Return what does not fit between the responses and the corpus section.

    Args:
        generate: the responses.
        max_length: of the corpus, tokens; None: not known yet.
        overlong: what the corpus does with longer rows.
    """
    mistakes: list[str] = []
    if not generate.enabled:
        return mistakes
    if overlong == "split":
        mistakes.append(
            "corpus.overlong: found split, expected truncate or drop: half a question has no answer"
        )
    if max_length is not None and max_length - generate.max_new_tokens < generate.prompt_tokens:
        mistakes.append(
            f"generate.max_new_tokens: found {generate.max_new_tokens} and "
            f"{generate.prompt_tokens} prompt_tokens, expected together at most "
            f"corpus.max_length ({max_length})"
        )
    return mistakes
