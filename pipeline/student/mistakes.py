"""Several refusals as one error, so that a run is told all that is wrong with it at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import ConfigError, DistillError

__all__ = ["Mistakes"]


class Mistakes:
    """Collects what checks raise, to raise it as one error."""

    def __init__(self) -> None:
        """Hold none."""
        self._errors: list[DistillError] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep the error that ends the block; what follows the block goes on without its result."""
        try:
            yield
        except DistillError as error:
            self._errors.append(error)

    def add(self, line: str) -> None:
        """Keep a mistake of the configuration."""
        self._errors.append(ConfigError(mistakes=[line]))

    def raise_any(self) -> None:
        """Raise what was kept; does nothing where that is nothing.

        Raises:
            DistillError: a single one as it was raised. Several are a ConfigError with every
                mistake if any of them is one; else one of the first's kind.
        """
        if not self._errors:
            return
        first = self._errors[0]
        lines = list(dict.fromkeys(line for error in self._errors for line in _lines(error)))
        if len(lines) == 1 or len(self._errors) == 1:
            raise first
        if any(isinstance(error, ConfigError) for error in self._errors):
            raise ConfigError(mistakes=lines) from first
        joined = "".join(f"\n  - {line}" for line in lines)
        # Its kind decides the exit code.
        error = DistillError(f"{len(lines)} reasons why this run cannot be:{joined}")
        error.exit_code = first.exit_code
        raise error from first


def _lines(error: DistillError) -> tuple[str, ...]:
    mistakes = getattr(error, "mistakes", ())
    return tuple(mistakes) or (str(error).rstrip("."),)
