"""The lock files agree where stages have to."""

from __future__ import annotations

import re
from pathlib import Path

LOCKS = Path(__file__).resolve().parents[3] / "stages/locks"


def test_one_transformers_for_both_stages_on_every_machine() -> None:
    locks = {
        name: re.findall(r"^transformers==(\S+)$", (LOCKS / name).read_text(), re.MULTILINE)
        for name in ("cpu.lock", "student-gpu.lock", "teacher-gpu.lock")
    }
    assert len({tuple(versions) for versions in locks.values()}) == 1, locks
    assert all(len(versions) == 1 for versions in locks.values())
