"""Who may speak, in which shape, and that libraries keep quiet."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from pipeline.observe import configure_logging, process_rank


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _own_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "NO_COLOR", "DISTILL_LOG_JSON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    configure_logging("debug")  # takes the libraries' filters off again
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_a_line_is_short_and_time_stamped() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream)
    logging.getLogger("pipeline.teacher.loop").info("shard=%d rows=%d", 12, 4096)
    pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d info teacher\.loop: shard=12 rows=4096\n"
    assert re.fullmatch(pattern, stream.getvalue())


def test_a_second_call_replaces_the_first() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream)
    configure_logging("warning", stream=stream)
    logging.getLogger("pipeline").info("hidden")
    logging.getLogger("pipeline").warning("once")
    assert stream.getvalue().count("\n") == 1


def test_other_ranks_only_warn_and_say_who_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    stream = io.StringIO()
    configure_logging(stream=stream)
    logging.getLogger("pipeline").info("hidden")
    logging.getLogger("pipeline").warning("seen")
    assert "hidden" not in stream.getvalue()
    assert "warning [rank 3] pipeline: seen" in stream.getvalue()


@pytest.mark.parametrize("text", ["", "x", "-1"])
def test_a_strange_rank_is_rank_0(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("RANK", text)
    assert process_rank() == 0


@pytest.mark.parametrize("library", ["vllm.engine", "DeepSpeed", "urllib3.connectionpool"])
def test_libraries_are_quiet_even_after_they_reset_their_level(library: str) -> None:
    stream = io.StringIO()
    configure_logging(stream=stream)
    logger = logging.getLogger(library)
    logger.setLevel(logging.INFO)
    logger.info("chatter")
    logger.warning("matters")
    logger.setLevel(logging.NOTSET)
    assert "chatter" not in stream.getvalue()
    assert "matters" in stream.getvalue()


def test_debug_lets_libraries_talk_again() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream)
    configure_logging("debug", stream=stream)
    logging.getLogger("urllib3.connectionpool").debug("chatter")
    logging.getLogger("DeepSpeed").info("chatter")
    assert stream.getvalue().count("chatter") == 2


def test_json_lines_hold_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_LOG_JSON", "1")
    stream = io.StringIO()
    configure_logging(stream=stream)
    try:
        raise ValueError("ü\nline")
    except ValueError:
        logging.getLogger("pipeline.x").exception("failed")
    entry = json.loads(stream.getvalue())
    assert (entry["level"], entry["logger"], entry["rank"]) == ("error", "pipeline.x", 0)
    assert entry["message"] == "failed"
    assert "ValueError: ü\nline" in entry["exception"]


@pytest.mark.parametrize(("no_color", "colored"), [("", True), ("1", False)])
def test_color_only_on_a_terminal_and_never_against_no_color(
    monkeypatch: pytest.MonkeyPatch, no_color: str, colored: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    stream = _Terminal()
    configure_logging(stream=stream)
    logging.getLogger("pipeline").warning("seen")
    assert ("\033[33m" in stream.getvalue()) is colored


def test_a_broken_log_call_never_breaks_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    root.handlers.clear()  # pytest's own handler raises on purpose
    configure_logging(stream=io.StringIO())
    logging.getLogger("pipeline").info("%d", "not a number")
    assert "Logging error" in capsys.readouterr().err
