"""Benches run seldom: each can at least be imported, so that a name that moved is noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BENCHES = sorted(path.stem for path in (ROOT / "tests/bench").glob("[a-z]*.py"))


def test_each_can_be_imported() -> None:
    assert len(BENCHES) > 20
    lines = "\n".join(f"import tests.bench.{name}" for name in BENCHES)
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
