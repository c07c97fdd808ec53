"""First contact: README's own-data commands, a second `make distill`, the result of the default.

`python -m tests.bench.first_run` runs the block of README's section on one's own models as it is,
over 600 chats with a tiny teacher and student of seeded weights, in a fresh folder; then
`make distill` twice; then three seeds of the default run (`tests.bench.demonstration`).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bench.demonstration import print_figures, train_pairs
from tests.stage_runner import ROOT
from tests.tiny import make_teacher, make_tokenizer, write_corpus

ROWS = 600
_OURS = "runs/mine"
"""The folder that README's commands write."""


def own_commands() -> list[str]:
    """Return the commands of README's section on one's own models, without the line of names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"^```\n(.*?)^```", text, re.S | re.M) if _OURS in b)
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    assert lines[0].startswith("export TEACHER="), lines[0]
    return lines[1:]


def own_run(folder: Path) -> None:
    """Do what README says, with a teacher, a student and chats of one's own."""
    corpus = write_corpus(folder / "corpus", samples=ROWS)
    tokenizer = make_tokenizer(corpus)
    names = {
        "TEACHER": str(make_teacher(folder / "teacher", tokenizer)),
        "STUDENT": str(make_teacher(folder / "student", tokenizer, seed=1, layers=2)),
        "DATA": str(corpus),
    }
    started = time.monotonic()
    for command in own_commands():
        print(f"$ {command}", flush=True)
        shell(command.replace(_OURS, str(folder / "mine")), **names)
    minutes = (time.monotonic() - started) / 60
    page = folder / "mine/student/report/report.html"
    assert page.exists(), f"no report at {page}"
    print(f"FIGURE first_own_run_minutes {minutes:.2f}")


def second_distill(folder: Path) -> None:
    """Run `make distill` until it has nothing left to do, and time that."""
    shell(f"make --no-print-directory distill RUN={folder}")
    started = time.monotonic()
    shell(f"make --no-print-directory distill RUN={folder}")
    print(f"FIGURE second_distill_seconds {time.monotonic() - started:.1f}")


def three_seeds(folder: Path) -> None:
    """Train distilled student and control of the default run with three seeds; compare them."""
    print_figures(train_pairs(folder))


def shell(command: str, **names: str) -> None:
    """Run a command of README in the checkout; a failure ends the bench with what it said."""
    outer = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    done = subprocess.run(
        command, shell=True, cwd=ROOT, check=False, env={**environment, **names},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sections that are asked for."""
    sections: dict[str, Callable[[Path], None]] = {
        "own": own_run, "second": second_distill, "demonstration": three_seeds,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--folder", type=Path, help="keep the runs here, and use finished ones")
    options = parser.parse_args(argv)
    with TemporaryDirectory() as temporary:
        for name in options.sections:
            print(f"\n{name}", flush=True)
            folder = (options.folder or Path(temporary)) / name
            folder.mkdir(parents=True, exist_ok=True)
            sections[name](folder)


if __name__ == "__main__":
    main()
