"""What a model's own code raises in a pass over tokens, in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.errors import ModelError

__all__ = ["refusal", "refusals_in_words"]

_KINDS = (
    TypeError, ValueError, NotImplementedError, ImportError, RuntimeError, LookupError,
    AttributeError,
)  # fmt: skip
_NOT_THE_MODELS = (
    "gloo", "NCCL", "Connection closed", "Connection reset", "timed out", "out of memory",
    "not enough memory",
)  # fmt: skip


def refusal(error: Exception) -> str | None:
    """Return the first line of what a model said; None where it is not the model's to say.

    A peer that is gone and memory that is full are other people's errors.
    """
    text = str(error).strip()
    if not isinstance(error, _KINDS) or any(word in text for word in _NOT_THE_MODELS):
        return None
    return (text or type(error).__name__).splitlines()[0]


@contextmanager
def refusals_in_words(model: Any, what: str) -> Iterator[None]:
    """While open, what the model's code raises is a `ModelError`.

    Args:
        model: of transformers, or code that a repository brings.
        what: is run, as in `one sequence`.

    Raises:
        ModelError: it raises.
    """
    try:
        yield
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        raise ModelError(
            f"{type(model).__name__} cannot run {what} here ({type(error).__name__}: {reason})",
            expected="a causal language model that takes token ids and position ids",
            do="choose another student"
            + (", or --train.zero_stage 2, which keeps its weights whole" if partitioned else ""),
        ) from error
