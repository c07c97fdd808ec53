"""Library loggers as they are before the library is imported."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def fresh_deepspeed_logger() -> Iterator[None]:
    """Undo what importing DeepSpeed does to its logger; transformers imports it on the way."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.handlers[:], logger.propagate, logger.level
    logger.handlers.clear()
    logger.propagate = True
    yield
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])
