"""Generators by name of the engine: the one that is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.teacher.generation.base import Generator
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.settings import TeacherSettings

__all__ = ["open_generator"]


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
