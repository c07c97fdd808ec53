"""What leases cost: 64 workers on 5,000 empty shards, and two workers against one on a teacher.

    python -m tests.bench.leases

Ends with `FIGURE lease_overhead_percent`: of the CPU time of two workers that make shards (teacher,
encoding, writing and all), the part that goes into leases, heartbeats, take-overs and listings.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.cache.layout.embedded_checksum import checksum
from pipeline.cache.layout.names import record_name, shard_name
from pipeline.cache.layout.records import ShardRecord, encode_record
from pipeline.corpus.table import SampleTable
from pipeline.observe.shares import Shares
from pipeline.storage import Store
from pipeline.teacher.capture.plan import PlannedShard
from pipeline.teacher.fleet.leases import LEASES, LeaseBoard
from pipeline.teacher.fleet.processes import worker_name
from pipeline.teacher.fleet.queue import leased_work

ROOT = Path(__file__).resolve().parent.parent.parent
LEASE_S = 120.0


def _commit_empty(shard: PlannedShard, store: Store) -> None:
    record = ShardRecord(
        split=shard.split, index=shard.index, path=shard_name(shard.split, shard.index),
        rows=0, tokens=0, loss_tokens=0, entries=0, bytes=1, xxh3_128=checksum(b"x"),
        kept_mass=0.0, entropy=0.0,
    )  # fmt: skip
    # As `commit_shard` does, but not synced: the disk's syncs are not what leases cost.
    store.write(record.path, b"x", once=True)
    store.write(record_name(shard.split, shard.index), encode_record(record), once=True)


def _commit_all(folder: Path, shards: int, number: int, go: Any) -> None:
    nothing = SampleTable.of([])
    planned = [PlannedShard("train", index, nothing) for index in range(shards)]
    board = LeaseBoard(Store(str(folder / "cache")), worker_name(), LEASE_S)
    go.wait()
    with board.beating(), (folder / f"{number}.log").open("a") as log:
        for shard, lease in leased_work(planned, "_meta/shards", board, shares=Shares()):
            print(shard.name, file=log, flush=True)
            _commit_empty(shard, board.store)
            board.done(lease)
    board.sweep()


def lease_all(folder: Path, *, workers: int, shards: int) -> float:
    """Let processes lease all shards; return leases per second, and fail on a double lease."""
    folder.mkdir()
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
    made = Counter(name for log in folder.glob("*.log") for name in log.read_text().split())
    assert len(made) == shards, f"{shards - len(made)} shards were not written"
    double = sum(count - 1 for count in made.values())
    assert not double, f"{double} double leases"
    assert not list((folder / "cache" / LEASES).iterdir())
    return shards / took


def _measured(into: Counter[str], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `call` to add its CPU time, on any thread, to `into[name]`."""

    def wrapper(*args: Any, **options: Any) -> Any:
        begun = time.thread_time()
        try:
            return call(*args, **options)
        finally:
            into[name] += time.thread_time() - begun  # type: ignore[assignment]
            into["calls"] += 1

    return wrapper


def measured_worker(result: Path, flags: list[str]) -> None:
    """Run stage one in this process and write what its leases and the whole loop cost."""
    from pipeline.errors import run_command
    from pipeline.teacher.capture.worker import CaptureWorker
    from pipeline.teacher.fleet import leases
    from stages.cache_teacher import main

    spent: Counter[str] = Counter()
    for name in ("attempts", "try_lease", "bad_ends", "beat", "done"):
        method = getattr(leases.LeaseBoard, name)
        setattr(leases.LeaseBoard, name, _measured(spent, "leases", method))
    listing = Store.list

    def list_records(self: Store, folder: str) -> list[str]:
        # The leases' folder is listed by `attempts`, which is measured already.
        wrapped = _measured(spent, "leases", listing) if folder == "_meta/shards" else listing
        return list(wrapped(self, folder))

    Store.list = list_records  # type: ignore[method-assign]
    real = CaptureWorker.run

    def all_made(*args: Any, **options: Any) -> None:
        begun = time.process_time()
        spent.clear()
        real(*args, **options)
        spent["loop"] = time.process_time() - begun  # type: ignore[assignment]

    CaptureWorker.run = all_made  # type: ignore[method-assign]
    assert run_command(lambda: main(flags)) == 0
    result.write_text(json.dumps(spent))


def teacher_runs(
    folder: Path, *, samples: int, shard_tokens: int, workers: int
) -> dict[str, float]:
    """Make one cache with `workers` processes; return the sums of their CPU times in seconds."""
    from tests.tiny import make_teacher, make_tokenizer, write_corpus

    corpus = write_corpus(folder / "corpus", samples=samples)
    if not (folder / "teacher").exists():
        make_teacher(folder / "teacher", make_tokenizer(corpus))
    flags = [
        "--teacher_model", str(folder / "teacher"), "--teacher.engine", "transformers",
        "--dataset_name", str(corpus), "--max_length", "96",
        "--capture.shard_tokens", str(shard_tokens), "--observe.log_level", "error",
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
    total["shards"] = len(list((folder / f"cache-{workers}/_meta/shards").iterdir()))
    return dict(total)


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
        print(f"{'workers':>10} {'leases/s':>10} {'to one':>8}  double")
        one = lease_all(folder / "one", workers=1, shards=max(1, chosen.shards // 5))
        print(f"{1:>10} {one:>10.0f} {1:>8.2f}  none")
        many = lease_all(folder / "many", workers=chosen.workers, shards=chosen.shards)
        print(f"{chosen.workers:>10} {many:>10.0f} {many / one:>8.2f}  none")
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
    print(f"FIGURE lease_overhead_percent {share:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
