"""What the submit tests share: the stand-in of the API server, and a command's call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from k8s.__main__ import main
from pipeline.errors import run_command
from tests.cluster.api_stub import ApiStub


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiStub]:
    monkeypatch.chdir(tmp_path)  # no record of pushed images here
    with ApiStub(tmp_path) as stub:
        for name, value in stub.environment().items():
            monkeypatch.setenv(name, value)
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "distill"}}
        stub.put(namespace)
        yield stub


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command as `python -m k8s` would; return exit code, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = run_command(lambda: main(arguments))
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run
