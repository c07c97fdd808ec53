"""Ask one check in this process: `python -m tests.gpu.one NAME DEVICE SCRATCH FILE`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.gpu.check import Outcome, Place, run_check
from tests.gpu.checks import CHECKS


def main(name: str, device: str, scratch: str, file: str) -> None:
    """Write the outcome of check `name` to `file`, as JSON."""
    check = next(check for check in CHECKS if check.name == name)
    started = time.monotonic()
    state, figures, message = run_check(check, Place(device, Path(scratch)))
    outcome = Outcome(
        name, check.question, state, time.monotonic() - started, tuple(figures), message
    )
    Path(file).write_text(json.dumps(outcome.to_json()))


if __name__ == "__main__":
    main(*sys.argv[1:])
