"""What leases cost: 64 workers on 5,000 empty shards, and two workers against one on a teacher.

    python -m tests.bench.leases

Ends with `FIGURE lease_overhead_percent`: of the CPU time of two workers that make shards (teacher,
encoding, writing and all), the part that goes into leases, heartbeats, take-overs, listings and the
folding of records.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.cache.layout.manifest import read_manifest
from pipeline.cache.layout.names import record_name
from pipeline.cache.layout.records import encode_record
from pipeline.corpus.prepared.summary import SampleTotals
from pipeline.observe.shares import Shares
from pipeline.progress import Progress
from pipeline.storage import Store
from pipeline.teacher.capture.plan import PlannedShard
from pipeline.teacher.capture.pool import ShardPool
from pipeline.teacher.fleet.leases import LEASES, LeaseBoard
from pipeline.teacher.fleet.processes import worker_name
from pipeline.teacher.fleet.queue import leased_work
from tests.unit.cache.records import made_up_data, made_up_record

ROOT = Path(__file__).resolve().parent.parent.parent
LEASE_S = 120.0
LEASED = "leased"
"""Begins the line of a worker's log for a shard that it has taken."""


class _EmptyShards:
    """Shards that are all known, of which nothing is read."""

    is_complete, num_tokens, source_xxh3_128 = True, 1, ""

    def __init__(self, shards: int) -> None:
        self.shards: Any = [
            PlannedShard("train", index, self)  # type: ignore[arg-type]
            for index in range(shards)
        ]

    def refresh(self) -> None:
        """Nothing more comes."""

    def projected(self) -> SampleTotals:
        """Return the sums."""
        return SampleTotals(len(self.shards), len(self.shards), 0)


def _commit_empty(shard: PlannedShard, store: Store) -> None:
    record = made_up_record(*shard.key)
    # As `commit_shard` does, but not synced: the disk's syncs are not what leases cost.
    store.write(record.path, made_up_data(*shard.key), once=True)
    store.write(record_name(*shard.key), encode_record(record), once=True)


def _commit_all(folder: Path, shards: int, number: int, go: Any) -> None:
    board = LeaseBoard(Store(str(folder / "cache")), worker_name(), LEASE_S)
    tries = Counter[str]()
    real = LeaseBoard.try_lease

    def try_lease(self: LeaseBoard, shard: str, newest: int | None) -> Any:
        tries["all"] += 1
        return real(self, shard, newest)

    LeaseBoard.try_lease = try_lease  # type: ignore[method-assign]
    shares = Shares()
    with Progress(enabled=False) as progress:
        pool = ShardPool(
            _EmptyShards(shards),  # type: ignore[arg-type]
            board, progress, shares, on_complete=lambda: None,
        )  # fmt: skip
        go.wait()
        with board.beating(), (folder / f"{number}.log").open("a") as log:
            for shard, lease in leased_work(pool, board, shares=shares, in_order=True):
                print(LEASED, shard.name, file=log, flush=True)
                _commit_empty(shard, board.store)
                board.done(lease)
            print("tries", tries["all"], file=log)
    board.sweep()


def lease_all(folder: Path, *, workers: int, shards: int) -> tuple[float, int]:
    """Let processes lease all shards, and fail on a double lease.

    Returns:
        Leases per second, and the attempts at leases.
    """
    folder.mkdir()
    encode_record(made_up_record("train", 0))  # what it imports, once for all processes
    context = multiprocessing.get_context("fork")
    go = context.Barrier(workers + 1)
    processes = [
        context.Process(target=_commit_all, args=(folder, shards, number, go))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    go.wait()
    begun = time.monotonic()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    took = time.monotonic() - begun
    lines = [line.split() for log in folder.glob("*.log") for line in log.read_text().splitlines()]
    made = Counter(value for what, value in lines if what == LEASED)
    assert len(made) == shards, f"{shards - len(made)} shards were not written"
    double = sum(count - 1 for count in made.values())
    assert not double, f"{double} double leases"
    assert not list((folder / "cache" / LEASES).iterdir())
    return shards / took, sum(int(value) for what, value in lines if what == "tries")


class _Spent:
    """CPU time that goes into leases, on all threads; of calls inside calls, the outer one's."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = threading.local()

    def measured(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function to count its time."""

        def wrapper(*args: Any, **options: Any) -> Any:
            if getattr(self._inside, "now", False):
                return call(*args, **options)
            self._inside.now = True
            begun = time.thread_time()
            try:
                return call(*args, **options)
            finally:
                self.seconds += time.thread_time() - begun
                self._inside.now = False

        return wrapper


def measured_worker(result: Path, flags: list[str]) -> None:
    """Run stage one in this process and write what its leases and the whole loop cost."""
    from pipeline.errors import run_command
    from pipeline.teacher.capture.worker import CaptureWorker
    from pipeline.teacher.preparation import work
    from stages.cache_teacher import main

    spent = _Spent()
    # The shards' leases and those of the units, which the same worker prepares beside its teacher.
    owned = [(LeaseBoard, n) for n in ("attempts", "try_lease", "bad_ends", "beat", "done")]
    for owner, name in [*owned, (ShardPool, "missing"), (work._UnitPool, "missing")]:
        setattr(owner, name, spent.measured(getattr(owner, name)))
    real = CaptureWorker.run

    def all_made(*args: Any, **options: Any) -> None:
        begun = time.process_time()
        spent.seconds = 0.0
        real(*args, **options)
        loop = time.process_time() - begun
        result.write_text(json.dumps({"leases": spent.seconds, "loop": loop}))

    CaptureWorker.run = all_made  # type: ignore[method-assign]
    assert run_command(lambda: main(flags)) == 0


def teacher_runs(
    folder: Path, *, samples: int, shard_tokens: int, workers: int
) -> dict[str, float]:
    """Make one cache with `workers` processes; return the sums of their CPU times in seconds.

    Units of the corpus are as much smaller than usual as shards are.
    """
    from tests.tiny import make_teacher, make_tokenizer, write_corpus

    corpus = write_corpus(folder / "corpus", samples=samples)
    if not (folder / "teacher").exists():
        make_teacher(folder / "teacher", make_tokenizer(corpus))
    flags = [
        "--teacher_model", str(folder / "teacher"), "--teacher.engine", "transformers",
        "--dataset_name", str(corpus), "--max_length", "96",
        "--capture.shard_tokens", str(shard_tokens), "--corpus.processes", "1",
        "--corpus.unit_mib", str(16 * shard_tokens / 1e6), "--observe.log_level", "error",
        "--cache_dir", str(folder / f"cache-{workers}"),
    ]  # fmt: skip
    results = [folder / f"{workers}-{number}.json" for number in range(workers)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.bench.leases", "--measured", str(result), *flags],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )
        for result in results
    ]
    assert [process.wait() for process in running] == [0] * workers
    total: Counter[str] = Counter()
    for result in results:
        total.update(json.loads(result.read_text()))
    found = read_manifest(Store(str(folder / f"cache-{workers}"))).total().shards
    return {**total, "shards": found}


def main(argv: Sequence[str] | None = None) -> int:
    """Run both benches and print their tables."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--measured"]:
        measured_worker(Path(arguments[1]), arguments[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--shard_tokens", type=int, default=10_000)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-leases-") as name:
        folder = Path(name)
        print(f"{chosen.shards} empty shards, each leased, committed and recorded, on local disk")
        print(f"{'workers':>10} {'leases/s':>10} {'to one':>8} {'attempts':>9}  double")
        one, tries = lease_all(folder / "one", workers=1, shards=max(1, chosen.shards // 5))
        print(f"{1:>10} {one:>10.0f} {1:>8.2f} {tries:>9}  none")
        many, tries = lease_all(folder / "many", workers=chosen.workers, shards=chosen.shards)
        print(f"{chosen.workers:>10} {many:>10.0f} {many / one:>8.2f} {tries:>9}  none")
        (folder / "runs").mkdir()
        print()
        print(f"tiny teacher, shards of {chosen.shard_tokens} tokens (the default is 1,000,000)")
        print(f"{'workers':>10} {'shards':>7} {'CPU to one':>11} {'ms of leases/shard':>19} "
              f"{'leases, %':>10}")  # fmt: skip
        share, first = 0.0, 0.0
        for workers in (1, 2):
            run = teacher_runs(
                folder / "runs",
                samples=chosen.samples,
                shard_tokens=chosen.shard_tokens,
                workers=workers,
            )
            first = first or run["loop"]
            share = 100 * run["leases"] / run["loop"]
            print(
                f"{workers:>10} {run['shards']:>7.0f} {run['loop'] / first:>11.2f} "
                f"{1000 * run['leases'] / run['shards']:>19.2f} {share:>10.3f}"
            )
    print(f"FIGURE lease_attempts {tries}")
    print(f"FIGURE lease_overhead_percent {share:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
