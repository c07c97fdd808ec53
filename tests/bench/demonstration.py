"""What `make distill` shows, over three seeds: the distilled student minus its control, held out.

The first seed is the default run itself, in `--run_dir`; the others start from its weights and
differ in the order of the samples. What is finished there is not trained again.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.evaluate.measures import HeldoutScores, MeanError, paired_difference, ratio_mean
from pipeline.observe.metrics import METRICS_FILE, read_metrics
from stages.distill import CONTROL, DistillRun, same_start, trainer

RUN_DIR = Path("runs/bench/demonstration")
SEEDS = (42, 1, 2)
METRICS = ("cross_entropy", "kl", "top1_agreement")
CURVE = "heldout/cross_entropy"


@dataclass(frozen=True, slots=True)
class Pair:
    """A distilled student and its control: the same seed, start and batches."""

    seed: int
    distilled: HeldoutScores
    control: HeldoutScores
    best_along_the_way: float
    """The control's lowest held-out cross-entropy of all its evaluations, in nats."""

    def difference(self, metric: str) -> MeanError:
        """Return distilled minus control, paired by sequence."""
        return paired_difference(self.distilled, self.control, metric)


def train_pairs(root: Path = RUN_DIR, seeds: Sequence[int] = SEEDS) -> list[Pair]:
    """Train what is missing below `root` and return the pairs, the default run's first."""
    run = DistillRun(run_dir=str(root))
    _run([sys.executable, "-m", "stages.distill", "--run_dir", str(root)])
    again = [
        *trainer(1), "--config", run.student_config, "--cache_dir", str(root / "cache"),
        *same_start(root / "student"),
    ]  # fmt: skip
    pairs = [_pair(root / "student", root / "control", seeds[0])]
    for seed in seeds[1:]:
        folders = root / f"student-{seed}", root / f"control-{seed}"
        for folder, flags in zip(folders, ((), CONTROL), strict=True):
            _run([*again, "--seed", str(seed), "--output_dir", str(folder), *flags])
        pairs.append(_pair(*folders, seed))
    return pairs


def over_seeds(pairs: Sequence[Pair], metric: str) -> tuple[float, float, float]:
    """Return the mean difference, and its standard errors over sequences and over seeds.

    Over sequences: each sequence's difference is the mean of the seeds' first, so that what the
    seeds have in common is not taken for more evidence than it is.
    """
    tokens = pairs[0].distilled.loss_tokens
    sums = [
        np.subtract(pair.distilled.sums_of(metric), pair.control.sums_of(metric)) for pair in pairs
    ]
    mean = ratio_mean(np.mean(sums, axis=0).tolist(), tokens)
    values = [pair.difference(metric).value for pair in pairs]
    by_seed = float(np.std(values, ddof=1)) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    return mean.value, mean.standard_error, by_seed


def print_figures(pairs: Sequence[Pair]) -> None:
    """Print a line for each seed, then the means, then the figure."""
    for pair in pairs:
        shown = [f"{name} {_shown(pair.difference(name))}" for name in METRICS]
        print(f"seed {pair.seed}: {', '.join(shown)}")
        ends = [scores.mean("cross_entropy").value for scores in (pair.distilled, pair.control)]
        print(
            f"  cross-entropy {ends[0]:.3f} and {ends[1]:.3f}; the control's lowest along the way "
            f"{pair.best_along_the_way:.3f}"
        )
    for name in METRICS:
        value, by_sequence, by_seed = over_seeds(pairs, name)
        print(
            f"mean of {len(pairs)} seeds, {name}: {value:+.4f}, standard error {by_sequence:.4f} "
            f"over sequences, {by_seed:.4f} over seeds"
        )
    ahead = np.mean(
        [pair.distilled.mean("cross_entropy").value - pair.best_along_the_way for pair in pairs]
    )
    print(f"FIGURE distilled_minus_best_control_ce_nats {ahead:+.4f}")
    value, by_sequence, by_seed = over_seeds(pairs, "cross_entropy")
    print(f"FIGURE distilled_minus_control_ce_standard_error {max(by_sequence, by_seed):.4f}")
    print(f"FIGURE distilled_minus_control_ce_nats {value:+.4f}")


def _pair(student: Path, control: Path, seed: int) -> Pair:
    logged = [record.values for record in read_metrics(control / METRICS_FILE)]
    return Pair(
        seed,
        *(HeldoutScores.read(str(folder / "heldout-after.json")) for folder in (student, control)),
        min(values[CURVE] for values in logged if CURVE in values),
    )


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def _shown(difference: MeanError) -> str:
    return f"{difference.value:+.4f} ± {difference.standard_error:.4f}"


def main() -> None:
    """Train what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, default=RUN_DIR)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    arguments = parser.parse_args()
    print_figures(train_pairs(arguments.run_dir, arguments.seeds))


if __name__ == "__main__":
    main()
