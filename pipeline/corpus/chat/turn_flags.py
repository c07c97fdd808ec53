"""What the data says about the training of single turns: weights, train flags, prefixes."""

from __future__ import annotations

from typing import Any

from pipeline.corpus.sources.rows import BadRow

__all__ = ["take_prefix", "take_supervision"]

_SUPERVISED = ("weight", "train", "training", "trainable", "train_on_turn", "loss")
_RANGES = ("train_detail", "training_detail")


def take_supervision(message: dict[str, Any], place: str, *, answer: bool) -> bool | None:
    """Remove the flags of a message and return what they say; None where they say nothing.

    Args:
        message: without keys whose value is null.
        place: for messages.
        answer: whether the message can be supervised at all.

    Raises:
        BadRow: a flag that is neither on nor off, flags that contradict each other, ranges of
            characters, or a turn to supervise that is no answer.
    """
    for key in _RANGES:
        if message.pop(key, None):
            raise BadRow(
                "supervised ranges of characters",
                f"{place}: {key!r} marks ranges of characters",
                expected="turns that are supervised as a whole, or not at all",
                do="split the turn, or remove the key",
            )
    said = {key: _switch(message.pop(key), key, place) for key in _SUPERVISED if key in message}
    if "masked" in message:
        masked = _switch(message.pop("masked"), "masked", place)
        # Not masked is how data describes any turn of a user, too: it asks for nothing there.
        if masked or answer:
            said["masked"] = not masked
    if len(set(said.values())) > 1:
        raise BadRow(
            "contradicting training flags",
            f"{place}: {' and '.join(map(repr, said))} contradict each other on the training",
            expected="flags that agree",
        )
    supervised = next(iter(said.values()), None)
    if supervised and not answer:
        raise BadRow(
            "training on a turn that is no answer",
            f"{place}: {next(iter(said))!r} asks for training on a turn that is context",
            expected="such a flag on an answer of the assistant: only answers are supervised",
        )
    return supervised


def take_prefix(message: dict[str, Any], place: str) -> bool:
    """Remove `prefix` and return whether the message is the beginning of an answer.

    Raises:
        BadRow: it is neither true nor false.
    """
    return "prefix" in message and _switch(message.pop("prefix"), "prefix", place)


def _switch(value: object, key: str, place: str) -> bool:
    # True, 1 and 1.0 are equal, and Parquet makes numbers of one column one type.
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise BadRow(
        "a training flag that is not on or off",
        f"{place}: {key!r} holds {value!r:.60}",
        expected="true or false, 1 or 0",
    )
