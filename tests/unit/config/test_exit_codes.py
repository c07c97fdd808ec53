"""Every exit code has one meaning, and the table of the options' page has all of them."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import errors
from pipeline.cache.layout.quarantine import QuarantinedRow, describe_quarantine
from pipeline.errors import (
    EXIT_CODES,
    CacheError,
    DistillError,
    RowsQuarantined,
    last_word_code,
    run_command,
)
from stages.options import PAGE, page
from stages.parts import Parts
from stages.steps import Steps
from tests.stage_runner import ROOT


def _kinds(base: type[DistillError]) -> Iterator[type[DistillError]]:
    yield base
    for kind in base.__subclasses__():
        yield from _kinds(kind)


def test_every_error_ends_with_a_code_of_the_table() -> None:
    for kind in _kinds(DistillError):
        assert kind.exit_code in EXIT_CODES, kind
    sources = [
        file for part in ("pipeline", "stages", "k8s") for file in (ROOT / part).rglob("*.py")
    ]
    written = {
        int(code)
        for file in sources
        for code in re.findall(
            r"\b(?:exit_code =|sys\.exit\(|SystemExit\()\s*(\d+)", file.read_text()
        )
    }
    assert {2, 3, 4, 5, 124, 143} <= written <= set(EXIT_CODES)


def test_no_code_has_two_meanings() -> None:
    rows = {"train-00000": (QuarantinedRow("0" * 32, "not finite", 3),)}
    usable = describe_quarantine(rows, planned_rows=9, url="memory://cache")
    assert usable.exit_code != CacheError.exit_code
    assert not isinstance(usable, CacheError)
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)


def test_the_page_has_the_table() -> None:
    text = page()
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in text
    assert text == PAGE.read_text(encoding="utf-8")


def test_a_stage_that_a_signal_ended_is_told_as_a_shell_does(tmp_path: Path) -> None:
    path = Parts(Steps(tmp_path), of=1)
    for number in (signal.SIGTERM, signal.SIGKILL):
        code = f"import os; os.kill(os.getpid(), {int(number)})"
        with pytest.raises(DistillError) as caught:
            path.stage("killed", [sys.executable, "-c", code], "", tmp_path)
        assert caught.value.exit_code == 128 + number


def test_a_command_ends_with_its_errors_code(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"train-00000": (QuarantinedRow("0" * 32, "not finite", 3),)}

    def done_but_for_a_row() -> int:
        raise describe_quarantine(rows, planned_rows=9, url="memory://cache")

    assert run_command(done_but_for_a_row) == 5
    assert "complete but for 1 of 9 rows" in capsys.readouterr().err


def _run_in_pod(
    error: Exception, path: Path, monkeypatch: pytest.MonkeyPatch, words: str = ""
) -> tuple[int, str]:
    """Return exit code and last words of a program that raises, as the only process of a pod."""
    path.write_text(words)
    monkeypatch.setattr(errors, "_LAST_WORDS", str(path))
    monkeypatch.setenv("DISTILL_POD", "1")

    def main() -> int:
        raise error

    return run_command(main), path.read_text()


def test_in_a_pod_done_but_for_rows_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pod that ends otherwise is started again until the back-off limit."""
    error = RowsQuarantined("2 of 9 rows are quarantined")
    assert _run_in_pod(error, tmp_path / "log", monkeypatch) == (0, "")
    assert capsys.readouterr().err == "warning: 2 of 9 rows are quarantined.\n"
    monkeypatch.delenv("DISTILL_POD")

    def main() -> int:
        raise error

    assert run_command(main) == 5


def test_in_a_pod_the_cause_is_left_for_who_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    code, words = _run_in_pod(CacheError("no cache"), log, monkeypatch)
    assert (code, last_word_code(words)) == (3, (3, "no cache."))
    # Another rank's consequence does not take the cause's place; the cause does take its.
    lost = DistillError("rank 1 lost another rank")
    assert _run_in_pod(lost, log, monkeypatch, words)[1] == words
    assert (
        last_word_code(_run_in_pod(CacheError("no"), log, monkeypatch, "exit 1: lost")[1])[0] == 3
    )
    # Nowhere to write to is no error.
    log.unlink()
    monkeypatch.setattr(errors, "_LAST_WORDS", str(tmp_path / "none"))
    assert run_command(lambda: (_ for _ in ()).throw(CacheError("x"))) == 3
    assert not (tmp_path / "none").exists()
    assert last_word_code("Traceback ...") == (None, "Traceback ...")
