"""Ask the machine all checks, print one table and write it to gpu-check.json.

    python -m tests.gpu [--teacher_python FILE] [--only NAME ...] [--out gpu-check.json]
                        [--minutes 20]
    python -m tests.gpu --table gpu-check.json

Each check runs in a process of its own, with the environment of its stage: after an error of the
device nothing else can run in that process. Exit code 1 where a check failed; what this machine
cannot tell is listed as not run, with what it needs. On a CPU the same list runs with what a CPU
can do, so that the command itself is tested. On a GPU all checks together have 20 minutes: what was
not asked or not answered by then has failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.gpu.check import Check, Machine, Outcome
from tests.gpu.checks import CHECKS
from tests.gpu.table import markdown_table, terminal_lines

ROOT = Path(__file__).resolve().parent.parent.parent
_PACKAGES = ("torch", "triton", "transformers", "deepspeed", "vllm", "flash-attn")


def machine() -> Machine:
    """Describe the machine: the device that torch uses, drivers and packages."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if gpus:
        versions["CUDA"] = str(torch.version.cuda)
        versions["driver"] = _driver()
    name = torch.cuda.get_device_name(0) if gpus else "CPU"
    return Machine(name, gpus, datetime.date.today().isoformat(), versions)


def _driver() -> str:
    found = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found.stdout.strip() or "unknown"


def ask(
    check: Check, here: Machine, python: str, scratch: Path, *, end: float | None = None
) -> Outcome:
    """Run one check in a process of its own; `end`: when all have to be done, by `monotonic`."""
    needed = max(check.gpus, check.processes if here.gpus else 0)
    if here.gpus < needed:
        needs = "a GPU" if needed == 1 else f"{needed} GPUs"
        return Outcome(check.name, check.question, "not run", 0.0, message=f"needs {needs}")
    started = time.monotonic()
    limit_s = check.limit_s if end is None else min(check.limit_s, end - started)
    if limit_s <= 0:
        said = "not asked: the time for all checks is over (--minutes)"
        return Outcome(check.name, check.question, "failed", 0.0, message=said)
    file, log = (scratch / f"{check.name}.{ending}" for ending in ("json", "log"))
    device = "cuda" if here.gpus else "cpu"
    command = [python, "-m", "tests.gpu.one", check.name, device, str(scratch), str(file)]
    with log.open("w") as output:
        # A group of its own: what the check has started is ended with it.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process.pid)
            process.wait()
    seconds = time.monotonic() - started
    outcome = None
    if code == 0 and file.exists():
        outcome = Outcome.from_json(json.loads(file.read_text()))
    if outcome is None or outcome.state == "failed":
        print(_tail(log), file=sys.stderr)
    if outcome is not None:
        return outcome
    how = f"not done after {limit_s:.3g} s" if code is None else f"ended with code {code}"
    return Outcome(check.name, check.question, "failed", seconds, message=how)


def _end(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def main() -> int:
    """Ask, print, write; or print the table of an earlier run."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--teacher_python", default=sys.executable)
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS])
    parser.add_argument("--minutes", type=float, help="for all checks; on a GPU 20")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--table", type=Path, help="print a file's table as Markdown, and end")
    arguments = parser.parse_args()
    if arguments.table:
        data = json.loads(arguments.table.read_text())
        outcomes = [Outcome.from_json(outcome) for outcome in data["checks"]]
        print(markdown_table(Machine(**data["machine"]), outcomes))
        return 0
    here = machine()
    minutes = arguments.minutes or (_MINUTES if here.gpus else None)
    end = None if minutes is None else time.monotonic() + 60 * minutes
    print(f"{here.device}; {', '.join(f'{k} {v}' for k, v in here.versions.items())}", flush=True)
    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        for check in CHECKS:
            if arguments.only and check.name not in arguments.only:
                continue
            python = arguments.teacher_python if check.stage == "teacher" else sys.executable
            outcomes.append(ask(check, here, python, Path(scratch), end=end))
            print("\n".join(terminal_lines(outcomes[-1])), flush=True)
    record = {"machine": asdict(here), "checks": [outcome.to_json() for outcome in outcomes]}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    counts = [sum(outcome.state == state for outcome in outcomes) for state in _STATES]
    print(
        ", ".join(f"{count} {state}" for count, state in zip(counts, _STATES, strict=True))
        + f"; written to {arguments.out}"
    )
    return 1 if counts[1] else 0


_STATES = ("passed", "failed", "not run")
_MINUTES = 20.0

if __name__ == "__main__":
    sys.exit(main())
