"""`train.profile_steps`: which steps are profiled, as text and as two numbers."""

from __future__ import annotations

import re

from pipeline.errors import ConfigError

__all__ = ["check_profile_window", "profile_window"]


def profile_window(text: str) -> tuple[int, int]:
    """Return the first and the last step of `first:last`, as steps are logged, from 1.

    Raises:
        ValueError: it is not two steps in rising order.
    """
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(
            f"train.profile_steps: found {text!r}, expected the first and the last step, from 1, "
            "such as 10:12"
        )
    return int(found[1]), int(found[2])


def check_profile_window(text: str, *, total_steps: int) -> None:
    """Reject a window that the run does not reach.

    Raises:
        ConfigError: it ends after the last step.
    """
    _, last = profile_window(text)
    if last > total_steps:
        raise ConfigError(
            f"train.profile_steps is {text}, but the run has {total_steps} steps",
            expected=f"steps from 1 to {total_steps}",
            do="choose an earlier window, or train for longer",
        )
