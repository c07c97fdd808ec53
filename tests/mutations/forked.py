"""Run pytest in forks of a process that has imported the libraries once, and nothing of ours.

A program of its own: reads one job a line from standard input, `{"tree", "tests", "limit_s"}`, and
answers each with one line, `{"ended", "code", "seconds", "said"}`. A fork imports the sources and
tests from its tree anew, so what was changed there since the last job is what it runs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

_PRELOADED = (
    "pytest", "anyio.pytest_plugin", "xdist.plugin", "hypothesis", "numpy", "yaml", "pydantic",
    "torch", "pyarrow.parquet", "safetensors.torch", "tokenizers", "transformers", "numba",
    "jinja2", "transformers.models.llama.modeling_llama", "fsspec.implementations.local",
)  # fmt: skip
_ELSEWHERE = 70
"""The fork's exit code when the sources it ran are not those of its tree."""


def _run(tree: str, tests: list[str], said: Path) -> int:
    """Run in the fork: pytest on `tests`, in a session of its own, all output in a file."""
    os.setsid()
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    sys.path.insert(0, tree)
    import pytest

    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    sys.stdout.flush()
    ours = sys.modules.get("pipeline")
    if ours is not None and not str(ours.__file__).startswith(tree + os.sep):
        return _ELSEWHERE
    return code


def _wait(child: int, limit_s: float) -> int | None:
    """Return the exit code of the fork, negative for a signal; None when it had to be killed."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def _answer(job: dict[str, object], said: Path) -> dict[str, object]:
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 71
        try:
            code = _run(str(job["tree"]), list(job["tests"]), said)  # type: ignore[call-overload]
        finally:
            os._exit(code)
    code = _wait(child, float(job["limit_s"]))  # type: ignore[arg-type]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the tests left running, or the fork itself
    if code is None:
        os.waitpid(child, 0)
    text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
    return {
        "ended": code is not None,
        "code": code,
        "seconds": round(time.monotonic() - began, 1),
        "said": text[-3000:],
    }


def main() -> None:
    """Answer jobs until standard input ends."""
    for name in _PRELOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            print(json.dumps(_answer(json.loads(line), Path(folder) / "said")), flush=True)


if __name__ == "__main__":
    main()
