"""Logging of one process: short time-stamped lines on stderr, chatter from rank 0 only."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import sys
from typing import TextIO

from pipeline.program import library_path

__all__ = ["NOISY_LIBRARIES", "configure_logging", "process_rank"]

NOISY_LIBRARIES = (
    "accelerate",
    "datasets",
    "deepspeed",
    "DeepSpeed",
    "filelock",
    "fsspec",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "matplotlib",
    "s3fs",
    "torch.distributed",
    "transformers",
    "urllib3",
    "vllm",
)
"""Libraries whose info lines drown ours; they still speak from warnings up."""

_COLORS = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m", logging.CRITICAL: "\033[31m"}
_RESET = "\033[0m"


def process_rank() -> int:
    """Return the rank that the launcher gave this process in `RANK`, or 0 without one."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdigit() else 0


def configure_logging(level: str = "info", *, stream: TextIO | None = None) -> None:
    """Set up the root logger; a second call replaces the first instead of doubling every line.

    `DISTILL_LOG_JSON=1` writes one JSON object a line, for log collectors. Colour is used for
    warnings and errors on a terminal only, and never with `NO_COLOR` set.

    Args:
        level: debug, info, warning or error.
        stream: where lines go; standard error if none, looked up at each line so that a
            redirected `sys.stderr` is honoured.
    """
    debug = level == "debug"
    rank = process_rank()
    handler = _LineHandler(stream)
    handler.addFilter(_RankFilter(rank, quieten=not debug))
    if _switched_on("DISTILL_LOG_JSON"):
        handler.setFormatter(_JsonFormatter(rank))
    else:
        target = stream or sys.stderr
        color = target.isatty() and not os.environ.get("NO_COLOR")
        handler.setFormatter(_LineFormatter(rank, color=color))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _LineHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(getattr(logging, level.upper()))
    logging.captureWarnings(True)
    _quieten_libraries(on=not debug)


def _quieten_libraries(*, on: bool) -> None:
    if on:
        # vLLM sets up its own handler when imported, and again in its engine's child process;
        # only the environment reaches both. Its warnings on a CPU are a page of advice; what stops
        # a run is an error or an exception. The same goes for torch's C++ side.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # no triton on a CPU
    for name in NOISY_LIBRARIES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING if on else logging.NOTSET)
        # DeepSpeed resets its logger's level when imported; a filter on the logger survives that.
        if on and _above_info not in logger.filters:
            logger.addFilter(_above_info)
        elif not on:
            logger.removeFilter(_above_info)


def _above_info(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _switched_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no")


class _RankFilter(logging.Filter):
    """Lets info lines of rank 0 and warnings of every rank pass."""

    def __init__(self, rank: int, *, quieten: bool) -> None:
        super().__init__()
        self._rank = rank
        self._prefixes = tuple(f"{name}." for name in NOISY_LIBRARIES) if quieten else ()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            return True
        return self._rank == 0 and not f"{record.name}.".startswith(self._prefixes)


class _LineFormatter(logging.Formatter):
    """`2026-11-28 12:00:00 info teacher.loop: message`, with the rank if it is not 0."""

    def __init__(self, rank: int, *, color: bool) -> None:
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self._rank = f" [rank {rank}]" if rank else ""
        self._color = color

    def format(self, record: logging.LogRecord) -> str:
        name = library_path(record.name)
        level = record.levelname.lower()
        if self._color and record.levelno in _COLORS:
            level = f"{_COLORS[record.levelno]}{level}{_RESET}"
        text = (
            f"{self.formatTime(record, self.datefmt)} {level}{self._rank} "
            f"{name}: {record.getMessage()}"
        )
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


class _JsonFormatter(logging.Formatter):
    """One JSON object a line; a traceback stays inside it."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        entry: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "rank": self._rank,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class _LineHandler(logging.Handler):
    """Writes a line without tearing a progress bar that is on the same terminal."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = self._stream or sys.stderr
            line = self.format(record) + "\n"
            with _bars_cleared(stream):
                stream.write(line)
                stream.flush()
        except Exception:  # the logging protocol: a log line never breaks the work
            self.handleError(record)


def _bars_cleared(stream: TextIO) -> contextlib.AbstractContextManager[None]:
    # A bar can only exist if tqdm was imported already; logging itself must not import it.
    tqdm = sys.modules.get("tqdm")
    if tqdm is None or not stream.isatty():
        return contextlib.nullcontext()
    manager: contextlib.AbstractContextManager[None] = tqdm.tqdm.external_write_mode(file=stream)
    return manager
