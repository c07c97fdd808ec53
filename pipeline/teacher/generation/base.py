"""The seam to whatever lets the teacher write: prompts and seeds in, token ids out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.settings import TeacherSettings

__all__ = ["Generator", "WriteRequest", "Written", "end_tokens", "open_generator"]


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """One response to be written."""

    response_id: str
    prompt_ids_L: NDArray[np.int32]
    seed: int
    """63 bits; with the prompt and the sampling settings it decides the draws."""


@dataclass(frozen=True, slots=True)
class Written:
    """One response as it was sampled."""

    token_ids_N: NDArray[np.int32]
    """At least one; the end-of-turn token included where the teacher wrote one."""
    logprobs_N: NDArray[np.float32] | None
    """Log-probs at temperature 1 over the whole vocabulary; None where they are not recorded."""


class Generator(Protocol):
    """A loaded teacher that writes."""

    def write(
        self,
        requests: Sequence[WriteRequest],
        *,
        on_responses: Callable[[int], None] | None = None,
    ) -> list[Written]:
        """Return the response to each request, in order.

        A call with the same requests gives the same tokens; the same request in another call
        draws with the same random numbers, from logits whose last bits may differ.

        Args:
            requests: what to write, all to be scheduled together.
            on_responses: told of finished responses; the sum is that of all requests.
        """
        ...

    def close(self) -> None:
        """Free the device, so that another engine can be opened in this process."""
        ...


def open_generator(
    teacher: TeacherSettings,
    generate: GenerateSettings,
    *,
    folder: Path,
    ends: Sequence[int],
    vocabulary: int,
    max_length: int,
) -> Generator:
    """Load the teacher from `folder`.

    Args:
        teacher: which engine, and how it runs.
        generate: how tokens are drawn.
        folder: the model's files.
        ends: tokens after which a response is over.
        vocabulary: ids from here on are padding of the head and are never drawn: they have no
            text, and a student whose head is not padded has no row for them.
        max_length: of prompt and response together, tokens.
    """
    if teacher.engine == "vllm":
        from pipeline.teacher.generation.vllm import VllmGenerator

        return VllmGenerator(
            teacher,
            generate,
            folder=folder,
            ends=ends,
            vocabulary=vocabulary,
            max_length=max_length,
        )
    from pipeline.teacher.generation.transformers import TransformersGenerator

    return TransformersGenerator(teacher, generate, folder=folder, ends=ends, vocabulary=vocabulary)


def end_tokens(folder: Path, tokenizer: Any, end_of_turn: int | None) -> tuple[int, ...]:
    """Return every token that ends a response, ascending.

    Engines disagree on where they look (generation config, model config, tokenizer), and a base
    model's files often lack the end-of-turn token of the template; so both engines get this list.
    """
    found = {end_of_turn, tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        given = data.get("eos_token_id")
        found |= set(given) if isinstance(given, list) else {given}
    return tuple(sorted(int(token) for token in found if token is not None))
