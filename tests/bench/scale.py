"""Stage one and two at scale: each figure beside the limit that it has to keep.

`python -m tests.bench.scale` runs the sections, each a module with `figures() -> dict[str, float]`,
prints one table and ends with exit code 1 where a figure is above its limit. `--sections threads`
runs some of them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence

LIMITS = {
    "corpus_tokenised_times": 1.05,
    "start_over_corpus_size": 1.3,
    "restart_requests_200k": 2000.0,
    "complete_cache_requests": 10.0,
    "fleet_requests_per_shard": 20.0,
    "fleet_requests_8_workers_over_2": 1.2,
    "read_amplification_world8": 1.1,
    "plan_seconds_50m": 5.0,
    "plan_mib_per_rank_1b": 1024.0,
    "sparsifier_two_threads_over_one": 1.1,
}
"""The largest allowed value of each figure."""
SECTIONS = ("corpus", "records", "data", "threads", "sizes")


def figures_of(section: str) -> dict[str, float]:
    """Measure one section; its module is imported here, so that none pays for another's imports."""
    module = importlib.import_module(f"tests.bench.scale_{section}")
    measure: Callable[[], dict[str, float]] = module.figures
    return measure()


def table(figures: Mapping[str, float], *, expected: Sequence[str] = ()) -> list[str]:
    """Return the lines of the table: figures with a limit first, in the limits' order.

    Args:
        figures: what was measured.
        expected: names that must not be missing.
    """
    names = [name for name in LIMITS if name in figures or name in expected]
    names += [name for name in figures if name not in LIMITS]
    lines = [f"{'figure':<42}{'value':>12}{'limit':>10}  kept"]
    for name in names:
        value, limit = figures.get(name), LIMITS.get(name)
        kept = "" if limit is None else "yes" if value is not None and value <= limit else "NO"
        lines.append(
            f"{name:<42}{'missing' if value is None else f'{value:.4g}':>12}"
            f"{'' if limit is None else f'{limit:g}':>10}  {kept}".rstrip()
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the sections and print; 1 where a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    sections = parser.parse_args(argv).sections
    figures: dict[str, float] = {}
    for section in sections:
        figures |= figures_of(section)
    expected = tuple(LIMITS) if set(sections) == set(SECTIONS) else ()
    lines = table(figures, expected=expected)
    print("\n" + "\n".join(lines))
    for name, value in figures.items():
        print(f"FIGURE {name} {value:.4g}")
    return 1 if any(line.endswith("NO") for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
