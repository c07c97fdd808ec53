"""Refuse an image whose packages are not those of the lock file; runs while it is built.

usage: check_image.py LOCK [--from-base PREFIX ...] [--needs NAME ...]

Packages that begin with a PREFIX are the base image's: they must be there in the same minor version.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path


def main(argv: list[str]) -> int:
    """Compare; print every difference, or one line when there is none."""
    lock, *rest = argv
    groups: dict[str, list[str]] = {"--from-base": [], "--needs": []}
    current: list[str] = []
    for word in rest:
        if word in groups:
            current = groups[word]
        else:
            current.append(word)
    prefixes = tuple(groups["--from-base"])
    wrong = []
    lines = Path(lock).read_text(encoding="utf-8").splitlines()
    pins = [match for line in lines if (match := re.match(r"([\w.-]+)==([^\s;]+)", line))]
    for pin in pins:
        name, wanted = pin[1], pin[2]
        try:
            # A local part (+cu133) names a build, not another version.
            found = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found = "nothing"
        if prefixes and name.startswith(prefixes):
            # CUDA libraries of the base are no Python packages; torch and triton are.
            same = found.split(".")[:2] == wanted.split(".")[:2] or (
                found == "nothing" and name.startswith(("nvidia-", "cuda-"))
            )
            if name.startswith(("nvidia-", "cuda-")):
                same = True
        else:
            same = found == wanted
        if not same:
            wrong.append(f"{name}: found {found}, expected {wanted}")
    for name in groups["--needs"]:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name}: not installed, expected the base image to bring it")
    for line in wrong:
        print(line, file=sys.stderr)
    if not wrong:
        print(f"{lock}: {len(pins)} packages as pinned")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
