"""Who writes the responses: the teacher itself, or another model with its vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError, ModelError
from pipeline.models.resolve import (
    most_positions,
    read_model_config,
    resolve_model,
    text_config,
    with_weights,
)
from pipeline.models.resolved import ResolvedModel
from pipeline.models.tokenizer import (
    end_tokens,
    load_tokenizer,
    vocabulary_difference,
    vocabulary_fingerprint,
)
from pipeline.teacher.engines.base import Teacher
from pipeline.teacher.settings import EndpointSettings, TeacherSettings

__all__ = ["Writer", "resolve_writer", "teacher_as_writer"]


@dataclass(frozen=True, slots=True)
class Writer:
    """A model that writes, resolved and not loaded."""

    settings: TeacherSettings
    """How it runs."""
    model: ResolvedModel
    end_tokens: tuple[int, ...] = ()
    """Beside the teacher's, ascending."""
    is_teacher: bool = True

    @property
    def called(self) -> str:
        """What messages call it."""
        return "the teacher" if self.is_teacher else f"the writer ({self.model.name})"

    def identity(self) -> dict[str, Any]:
        """Return what is added to the identity of the responses; nothing for the teacher's own."""
        if self.is_teacher:
            return {}
        shared = self.settings.tensor_parallel_size
        return {
            "writer": {
                "model": self.model.name,
                "revision": self.model.revision,
                **({"tensor_parallel_size": shared} if shared > 1 else {}),
            }
        }


def teacher_as_writer(teacher: Teacher) -> Writer:
    """Return the teacher, who writes where nobody else is named."""
    return Writer(teacher.settings, teacher.model)


def resolve_writer(
    name: str,
    teacher: TeacherSettings,
    *,
    revision: str | None = None,
    parallel_size: int = 1,
    tokenizer: Any,
    max_length: int,
) -> Writer:
    """Return the writer of a name.

    It runs on the teacher's engine, in its precision and step size, on as many GPUs as
    `parallel_size` says; `teacher.engine_options` are the teacher's alone.

    Args:
        name: a hub id or a model folder.
        teacher: how engines run.
        revision: branch, tag or commit of a hub id.
        parallel_size: GPUs that share it.
        tokenizer: the teacher's.
        max_length: of prompt and response together, tokens.

    Raises:
        ModelError: it cannot be had, or has another vocabulary or too few positions.
    """
    model = resolve_model(name, revision=revision, role="generate.writer", weights=False)
    own = load_tokenizer(model.path)
    if vocabulary_fingerprint(own) != vocabulary_fingerprint(tokenizer):
        difference = vocabulary_difference(tokenizer.get_vocab(), own.get_vocab())
        raise ModelError(
            f"generate.writer {name!r}: its vocabulary is not the teacher's: {difference}",
            expected="the same tokens under the same ids: what it writes is scored by its ids",
            do="take a writer of the teacher's family, or a student that was trained from one of "
            "its caches",
        )
    positions = most_positions(text_config(read_model_config(model.path)))
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"corpus.max_length: found {max_length}",
            expected=f"at most the {positions} positions of generate.writer {name!r}",
        )
    settings = teacher.model_copy(
        update={
            "model": name,
            "revision": revision,
            "tensor_parallel_size": parallel_size,
            "engine_options": {},
            **_runs_here(teacher),
        }
    )
    ends = tuple(sorted(end_tokens(model.path, own)))
    return Writer(settings, with_weights(model, "generate.writer"), ends, is_teacher=False)


def _runs_here(teacher: TeacherSettings) -> dict[str, Any]:
    """Return the engine of a writer whose teacher is behind an endpoint; else nothing."""
    if teacher.engine != "openai":
        return {}
    return {"engine": teacher.endpoint.writer_engine, "endpoint": EndpointSettings()}
