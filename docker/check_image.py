"""Reject an image whose packages are not those of the lock file; runs while it is built.

usage: check_image.py LOCK [--from-base NAME ...] [--without PREFIX ...] [--needs NAME ...]
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib import metadata
from pathlib import Path


def main(argv: list[str]) -> int:
    """Compare; print every difference, or one line when there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lock", type=Path)
    add = parser.add_argument
    add("--from-base", nargs="*", default=[], help="the base's own: the same minor version")
    add("--without", nargs="*", default=[], help="not compared (CUDA libraries of the base)")
    add("--needs", nargs="*", default=[], help="must be there, in whatever version")
    options = parser.parse_args(argv)
    lines = options.lock.read_text(encoding="utf-8").splitlines()
    pins = dict(match.groups() for line in lines if (match := re.match(_PIN, line)))
    wrong = []
    for name, wanted in pins.items():
        if name.startswith(tuple(options.without)):
            continue
        found = _version(name)
        same = found == wanted
        if name in options.from_base:
            same = found.split(".")[:2] == wanted.split(".")[:2]
        if not same:
            wrong.append(f"{name}: found {found or 'nothing'}, expected {wanted}")
    wrong += [f"{name}: found nothing, expected it" for name in options.needs if not _version(name)]
    for line in wrong:
        print(line, file=sys.stderr)
    if not wrong:
        print(f"{options.lock.name}: {len(pins)} packages as pinned")
    return 1 if wrong else 0


# `name==version`, but for lines that are meant for another system.
_PIN = r"([\w.-]+)==([^\s;]+)\s*$"


def _version(name: str) -> str:
    """Return what is installed, empty for nothing; a local part (+cu133) names only a build."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
