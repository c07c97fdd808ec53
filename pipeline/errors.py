"""The errors users read: found, expected, to do, an exit code; several of them told at once."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence

__all__ = [
    "EXIT_CODES",
    "FINAL_EXIT_CODES",
    "CacheError",
    "ConfigError",
    "CorpusError",
    "DistillError",
    "EngineStalled",
    "Interrupted",
    "Mistakes",
    "ModelError",
    "ResourceError",
    "ResumeError",
    "RowsQuarantined",
    "StoreError",
    "last_word_code",
    "run_command",
]

_log = logging.getLogger(__name__)

EXIT_CODES = {
    0: "done",
    1: "an error that the message explains",
    2: "a mistake in the configuration or on the command line",
    3: "a corpus, model, cache or checkpoint that cannot be used",
    4: "a store that fails, or too little memory or disk",
    5: "done, but for rows that are quarantined; what was made can be used",
    6: "the teacher's device hangs; the shard is taken over, the same command goes on",
    124: "a job on the cluster did not end within `--timeout`; it goes on",
    130: "stopped by Ctrl-C; the same command goes on",
    137: "a part of it was killed, most often for memory; the same command goes on",
    141: "what read the output has ended",
    143: "stopped by SIGTERM; the same command goes on",
}
"""What each exit code of a command means; no code has two meanings."""

FINAL_EXIT_CODES = (2, 3, 4)
"""What another try of the same command does not change."""
_LAST_WORDS = "/dev/termination-log"
"""Kubernetes' file for why a container ended; its size is bounded."""
_LONGEST_WORDS = 3000


class DistillError(Exception):
    """An error that the user can fix; printed as one message without a traceback."""

    exit_code = 1

    def __init__(self, found: str, *, expected: str = "", do: str = "") -> None:
        """Keep the three parts apart so that callers can add context to one of them."""
        self.found = found
        self.expected = expected
        self.do = do
        super().__init__(self._text())

    def _text(self) -> str:
        parts = [self.found]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.do:
            parts.append(self.do)
        text = "; ".join(part.rstrip(".") for part in parts)
        return text if text.endswith("?") else f"{text}."


class ConfigError(DistillError):
    """Fields, flags or values that do not fit the schema; reports all mistakes at once."""

    exit_code = 2

    def __init__(
        self, found: str = "", *, expected: str = "", do: str = "", mistakes: Sequence[str] = ()
    ) -> None:
        """Join several `mistakes` into one message, or take the three parts of a single one."""
        self.mistakes = tuple(mistakes)
        if mistakes and not found:
            count = len(mistakes)
            found = mistakes[0] if count == 1 else f"{count} mistakes in the configuration:\n  - "
            if count > 1:
                found += "\n  - ".join(mistakes)
        super().__init__(found, expected=expected, do=do)


class CorpusError(DistillError):
    """A corpus that cannot be reached, is empty, or fits no known format."""

    exit_code = 3


class ModelError(DistillError):
    """A teacher, student or tokenizer that cannot be used."""

    exit_code = 3


class CacheError(DistillError):
    """A cache that is incomplete, damaged, of another identity or of a newer format."""

    exit_code = 3


class RowsQuarantined(DistillError):
    """A run that is done, but for rows that the teacher fails on; its cache can be used."""

    exit_code = 5


class EngineStalled(DistillError):
    """A teacher that brings no token any more, and raises nothing."""

    exit_code = 6


class ResumeError(DistillError):
    """A checkpoint that does not belong to this run, or cannot be continued."""

    exit_code = 3


class StoreError(DistillError):
    """A file system or object store that denies access, fails or is full."""

    exit_code = 4


class ResourceError(DistillError):
    """Too little memory, disk or devices for the plan."""

    exit_code = 4


class Interrupted(DistillError):
    """The run was asked to stop (SIGTERM, SIGINT); the same command continues it."""

    exit_code = 143


class _Collected:
    def __init__(self, errors: list[DistillError]) -> None:
        self._errors = errors

    def __enter__(self) -> None:
        return None

    # Of type `bool`, so that a type checker knows that what follows the block may miss its result.
    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, DistillError):
            return False
        self._errors.append(error)
        return True


class Mistakes:
    """Collects what checks raise, so that a run is told all that is wrong with it at once."""

    def __init__(self) -> None:
        """Hold none."""
        self._errors: list[DistillError] = []

    def collected(self) -> _Collected:
        """Keep the error that ends the block; what follows the block goes on without its result."""
        return _Collected(self._errors)

    @property
    def are_there(self) -> bool:
        """Whether any was kept."""
        return bool(self._errors)

    def add(self, line: str) -> None:
        """Keep a mistake of the configuration."""
        self._errors.append(ConfigError(mistakes=[line]))

    def join(self, others: Mistakes) -> None:
        """Keep what another one has kept as well, after what is here."""
        self._errors += others._errors

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


def run_command(main: Callable[[], int | None]) -> int:
    """Run `main` and turn a `DistillError` into one message and its exit code.

    Other exceptions are bugs and keep their traceback. `DISTILL_TRACEBACK=1` shows the
    traceback of user errors as well. In a pod (`DISTILL_POD=1`), which is restarted until it
    succeeds, a run that is done but for some rows has succeeded, and the last words are left for
    who watches it.
    """
    in_pod = os.environ.get("DISTILL_POD") == "1"
    try:
        return main() or 0
    except DistillError as error:
        if in_pod and isinstance(error, RowsQuarantined):
            print(f"warning: {_shown(str(error))}", file=sys.stderr, flush=True)
            return 0
        if in_pod:
            _leave_last_words(error)
        if os.environ.get("DISTILL_TRACEBACK"):
            _log.exception("traceback requested by DISTILL_TRACEBACK")
        print(f"error: {_shown(str(error))}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; the same command continues the run.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `make ... | head` closes stdout; devnull keeps the interpreter's final flush from failing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _shown(text: str) -> str:
    """Return a message with control characters, which drive a terminal, as their codes.

    Names in it come from files that others wrote.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"⟨U+{ord(c[0]):04X}⟩", text)


def last_word_code(text: str) -> tuple[int | None, str]:
    """Return the exit code and the message of a program's last words; None where it left none."""
    found = re.match(r"exit (\d+): (.*)", text, re.DOTALL)
    return (int(found[1]), found[2].strip()) if found else (None, text)


def _leave_last_words(error: DistillError) -> None:
    """Write why this process ends, unless another rank of the container has written a cause."""
    try:
        with open(_LAST_WORDS, "r+", encoding="utf-8") as file:
            if last_word_code(file.read())[0] in FINAL_EXIT_CODES:
                return
            file.seek(0)
            file.truncate()
            file.write(f"exit {error.exit_code}: {str(error)[:_LONGEST_WORDS]}\n")
    except OSError:
        return  # the log has it
