"""Try every chat x template x container and print the figures: `make conformance`."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Iterable

from tests.conformance.chats import CHATS
from tests.conformance.containers import CONTAINERS
from tests.conformance.suite import (
    FEW_CHATS,
    container_cases,
    empty_cases,
    reasoning_cases,
    tokenizer_cases,
)
from tests.conformance.templates import TEMPLATES
from tests.conformance.test_supervised_text_property import EXAMPLES, check
from tests.conformance.trying import Case
from tests.conformance.vocabularies import KINDS

_LONG_EXAMPLES = 5_000


class _Tally:
    """Cases and how many of them are wrong, of one column of the table."""

    def __init__(self) -> None:
        self.cases = self.wrong = 0

    def add(self, cases: Iterable[Case]) -> None:
        for case in cases:
            self.cases += 1
            if not case.right:
                self.wrong += 1
                print(f"WRONG {case}")

    def __str__(self) -> str:
        return f"{self.cases:7,} cases {self.wrong:7,} wrong"


def main() -> int:
    """Print each wrong case and the figures; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument(
        "--long", action="store_true",
        help=f"all chats with every tokenizer, {_LONG_EXAMPLES:,} random chats",
    )  # fmt: skip
    long = parser.parse_args().long
    logging.disable(logging.CRITICAL)
    print(f"{len(CHATS)} chats, {len(TEMPLATES)} templates, {len(CONTAINERS)} containers")
    containers, others = _Tally(), _Tally()
    for template in TEMPLATES:
        before, wrong = containers.cases, containers.wrong
        containers.add(container_cases(template))
        for kind in KINDS[1:]:
            others.add(tokenizer_cases(template, kind, CHATS if long else FEW_CHATS))
        others.add(reasoning_cases(template, "template"))
        others.add(reasoning_cases(template, "drop"))
        if template.name not in ("llama2", "zephyr", "mistral", "harmony"):
            others.add(empty_cases(template))
        done, mistakes = containers.cases - before, containers.wrong - wrong
        print(f"{template.name:24} {done:6,} cases {mistakes:6,} wrong", flush=True)
    examples = _LONG_EXAMPLES if long else EXAMPLES
    random_wrong = _random(examples, derandomize=not long)
    print(f"containers               {containers}")
    print(f"tokenizers and settings  {others}")
    print(f"random chats             {examples:7,} cases {random_wrong:7,} wrong")
    wrong = containers.wrong + others.wrong + random_wrong
    print(f"FIGURE conformance_other_cases {others.cases}")
    print(f"FIGURE conformance_random_cases {examples}")
    print(f"FIGURE conformance_cases {containers.cases}")
    print(f"FIGURE conformance_wrong {wrong}")
    return 1 if wrong else 0


def _random(examples: int, *, derandomize: bool) -> int:
    try:
        check(examples, derandomize=derandomize)
    except Exception:
        print("WRONG random chat:")
        traceback.print_exc(file=sys.stdout)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
