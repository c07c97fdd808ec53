"""The stream of stage two alone: rate on one core, memory, time to resume, packing over padding.

`python -m tests.bench.stream` writes a synthetic cache of the default's shape and compares the
stream with `datasets` and torch's DataLoader over an export of the same cache as plain lists. Rates
are tokens per second of CPU time of the whole process: helper threads are included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import numpy as np
import torch

from pipeline.cache.io.reader import open_cache
from pipeline.cache.tools.export import export_plain
from pipeline.data.order.plan import TrainPlan
from pipeline.data.settings import DataSettings
from pipeline.data.stream.train_stream import TrainStream
from pipeline.observe.memory import peak_rss_bytes
from pipeline.storage import Store
from tests.bench.stream_cache import MAX_LENGTH, TOP_K, write_cache

PACKS_PER_STEP = 8
BASELINE_ROWS = 300
FEW, MANY = 1, 100


def open_stream(cache: Path, **settings: Any) -> TrainStream:
    """Open cache and stream as stage two does, on one rank."""
    return TrainStream(
        open_cache(str(cache)).source("train"),
        DataSettings(**{"read_threads": 0, **settings}),
        seed=0,
        packs_per_step=PACKS_PER_STEP,
        rank=0,
        world_size=1,
        accumulation=PACKS_PER_STEP,
        pack_length=MAX_LENGTH,
        temperature=1.0,
    )


def stream_rate(cache: Path, **settings: Any) -> float:
    """Return tokens per CPU second of one epoch, every shard read from disk."""
    stream = open_stream(cache, **settings)
    started = time.process_time()
    tokens = sum(step.num_tokens for step in stream.steps(0, stream.steps_per_epoch))
    return tokens / (time.process_time() - started)


def baseline_rate(plain: Path, scratch: Path) -> float:
    """Return tokens per CPU second of `datasets` and a DataLoader with a padding collator."""
    from datasets import load_dataset
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils.data import DataLoader

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True),
            "loss_mask": pad_sequence([torch.tensor(row["loss_mask"]) for row in rows], True),
            "target_ids": torch.cat([torch.tensor(row["target_ids"]) for row in rows]),
            "target_logprobs": torch.cat([torch.tensor(row["target_logprobs"]) for row in rows]),
        }

    files = sorted(str(file) for file in (plain / "data/train").glob("*.parquet"))
    data: Any = load_dataset(
        "parquet", data_files=files[:1], split="train", cache_dir=str(scratch / "datasets")
    )
    rows = data.select(range(min(BASELINE_ROWS, len(data))))
    tokens = sum(len(ids) for ids in rows["input_ids"])
    loader: Any = DataLoader(rows, batch_size=PACKS_PER_STEP, shuffle=True, collate_fn=collate)
    started = time.process_time()
    for _ in loader:
        pass
    return tokens / (time.process_time() - started)


def first_batch_seconds(cache: Path, share: float) -> float:
    """Return the wall time from opening the cache to the first batch, resumed at `share`."""
    started = time.monotonic()
    stream = open_stream(cache, read_threads=2)
    step = int(share * 3 * stream.steps_per_epoch)
    next(iter(stream.iterate(step)))
    seconds = time.monotonic() - started
    stream.close()
    return seconds


class Lengths:
    """A million row lengths, without rows."""

    def __init__(self, rows: int) -> None:
        """Sample the lengths."""
        rng = np.random.default_rng(0)
        self._rows = rows
        lengths = np.clip(rng.lognormal(4.8, 0.7, rows), 16, MAX_LENGTH).astype(np.int32)
        self._sizes = np.stack([lengths, lengths // 2], 1)

    def shard_rows(self) -> list[int]:
        """Shards of 7,000 rows: about a million tokens."""
        return [min(7000, self._rows - start) for start in range(0, self._rows, 7000)]

    def shard_sizes(self, shard: int) -> Any:
        """Tokens and supervised tokens of each row of a shard."""
        return self._sizes[shard * 7000 : (shard + 1) * 7000]


def plan_seconds(rows: int) -> float:
    """Return the wall time to plan a large cache and find a step near the end of epoch 100."""
    source: Any = Lengths(rows)
    started = time.monotonic()
    plan = TrainPlan(
        source, seed=0, packs_per_step=64, pack_length=MAX_LENGTH, shuffle_shards=8, lanes=64
    )
    plan.step(100 * plan.steps_per_epoch - 1)
    return time.monotonic() - started


def peak_mb(cache: Path, epochs: int) -> float:
    """Return the largest resident set of a process that streams so many epochs."""
    command = [sys.executable, "-m", "tests.bench.stream", "--epochs", str(epochs), str(cache)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])) / 1e6


def stream_epochs(cache: Path, epochs: int) -> None:
    """Stream whole epochs and print the peak."""
    stream = open_stream(cache)
    for _ in stream.steps(0, epochs * stream.steps_per_epoch):
        pass
    print(json.dumps(peak_rss_bytes()))


def useful_shares(cache: Path) -> tuple[float, float, float]:
    """Return the share of tokens that are not padding: padded in random order, by length,
    packed."""
    stream = open_stream(cache)
    lengths = np.asarray(open_cache(str(cache)).source("train").lengths(), np.int64)
    shuffled = np.random.default_rng(0).permutation(lengths)

    def padded(order: Any) -> float:
        groups = [order[i : i + PACKS_PER_STEP] for i in range(0, len(order), PACKS_PER_STEP)]
        return float(lengths.sum() / sum(len(group) * group.max() for group in groups))

    return padded(shuffled), padded(np.sort(lengths)), stream.plan.fill


def measure(root: Path, *, rows: int, repeats: int, epochs: int) -> None:
    """Measure all and print the tables."""
    cache, small, plain = root / "cache", root / "small", root / "plain"
    write_cache(cache, rows)
    write_cache(small, 500, top_k=8)
    export_plain(open_cache(str(cache)), Store(str(plain)))
    source = open_cache(str(cache)).source("train")
    tokens, loss_tokens = int(source.lengths().sum()), int(source.loss_token_counts().sum())
    print(
        f"cache: {len(source.lengths())} rows, {tokens} tokens, {100 * loss_tokens / tokens:.0f} % "
        f"supervised, top-{TOP_K}; packs of {MAX_LENGTH}, {PACKS_PER_STEP} a step\n"
    )
    stream_rate(cache)  # imports, allocator
    ways: dict[str, list[float]] = {"datasets + DataLoader": [], "packs": [], "token budget": []}
    for _ in range(repeats):
        ways["datasets + DataLoader"].append(baseline_rate(plain, root))
        ways["packs"].append(stream_rate(cache))
        ways["token budget"].append(stream_rate(cache, batch_tokens=PACKS_PER_STEP * MAX_LENGTH))
    rates = {name: median(found) for name, found in ways.items()}
    baseline = rates["datasets + DataLoader"]
    print(f"{'one core':<28}{'tokens/s':>12}{'ratio':>9}")
    for name, rate in rates.items():
        print(f"{name:<28}{rate:>12.0f}{rate / baseline:>9.1f}")
    few, many = peak_mb(small, FEW), peak_mb(small, epochs)
    print(f"\n{'peak memory':<28}{'MB':>12}{'ratio':>9}")
    for count, peak in ((FEW, few), (epochs, many)):
        print(f"{f'epochs: {count}':<28}{peak:>12.0f}{peak / few:>9.3f}")
    firsts = {share: first_batch_seconds(cache, share) for share in (0.0, 0.5, 0.99)}
    print(f"\n{'first batch after resume':<28}{'s':>12}{'ratio':>9}")
    for share, seconds in firsts.items():
        print(f"{f'at {100 * share:.0f} % of 3 epochs':<28}{seconds:>12.2f}", end="")
        print(f"{seconds / firsts[0.0]:>9.2f}")
    print(f"{'plan of a million rows':<28}{plan_seconds(1_000_000):>12.2f}")
    shares = useful_shares(cache)
    print(f"\n{'useful tokens':<28}{'share':>12}{'ratio':>9}")
    names = ("padded, random order", "padded, by length", "packed")
    for name, share in zip(names, shares, strict=True):
        print(f"{name:<28}{share:>12.3f}{share / shares[0]:>9.2f}")
    print()
    for name, value in (
        ("stream_tokens_per_s", rates["packs"]),
        ("stream_over_dataloader", rates["packs"] / baseline),
        ("stream_memory_ratio", many / few),
        ("resume_first_batch_s", max(firsts.values())),
        ("packing_useful_share", shares[2]),
        ("padding_useful_share", shares[0]),
    ):
        print(f"FIGURE {name} {value:.4g}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", nargs="?", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=3000, help="of the synthetic cache")
    parser.add_argument("--repeats", type=int, default=5, help="of each rate; the median counts")
    parser.add_argument("--epochs", type=int, default=None, help="of the long run for memory")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.cache is not None:
        stream_epochs(arguments.cache, arguments.epochs)
        return
    with TemporaryDirectory() as scratch:
        measure(
            Path(scratch),
            rows=arguments.rows,
            repeats=arguments.repeats,
            epochs=arguments.epochs or MANY,
        )


if __name__ == "__main__":
    main()
