"""Throw-away copies of the working tree, and a process that runs tests in one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.mutations.entries import ROOT

_BESIDE = (".venv", ".hyperpod-models")
"""What git ignores and tests need: linked, not copied."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of tests ended."""

    code: int | None
    """pytest's exit code, negative for a signal; None: it did not end in time."""
    seconds: float
    said: str


class Tree:
    """A copy of the working tree with its own test process; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.split("\0")  # fmt: skip
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        for file in (ROOT / "pipeline").rglob("__pycache__/*.nb[ic]"):  # numba's compiled kernels
            place = folder / file.relative_to(ROOT)
            place.parent.mkdir(exist_ok=True)
            shutil.copy2(file, place)
        for name in _BESIDE:
            if (ROOT / name).exists():
                (folder / name).symlink_to((ROOT / name).resolve())
        # By content: a line changed twice in a second to the same length must not run as before.
        compiling = ["compileall", "-q", "--invalidation-mode", "checked-hash"]
        here = [name for name in ("pipeline", "stages", "k8s", "tests") if (folder / name).exists()]
        subprocess.run([sys.executable, "-m", *compiling, *here], cwd=folder, check=True)

    def __enter__(self) -> Tree:
        self._process = subprocess.Popen(
            [sys.executable, "-P", ROOT / "tests/mutations/forked.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.folder,
            env={
                **os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu",
            },
        )  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, tests: tuple[str, ...], limit_s: float) -> Outcome:
        """Run the tests in the tree as it is now."""
        job = {"tree": str(self.folder), "tests": tests, "limit_s": limit_s}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that runs the tests has died")
        answer = json.loads(line)
        return Outcome(answer["code"], answer["seconds"], answer["said"])
