"""Try every line of `tests/mutations.toml` in throw-away copies: `make test-mutations`."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, Queue

from tests.mutations.entries import AREAS, ROOT, Mutation, counts, read
from tests.mutations.trees import Outcome, Tree

_RESULTS = ROOT / "runs/mutations/results.jsonl"
_UNSEEN = {"survived", "not found", "broken"}
"""What ends the run with an error; the last two say that the list is wrong, not the tests."""


_PATIENCE = 5.0
"""Times what the tests take in the unchanged tree: what then goes on is an endless loop."""


class _Runs:
    """The results so far, in a file: what was tried before and has not changed is not run again."""

    def __init__(self, file: Path, *, again: bool, trusting: bool) -> None:
        self._lock = threading.Lock()
        self._trusting = trusting
        self._healthy: dict[str, float | None] = {}
        self.verdicts: dict[str, str] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not again:
            for line in file.read_text(encoding="utf-8").splitlines():
                item = json.loads(line)
                if item["verdict"] == "killed":  # the rest is tried again
                    self.verdicts[item["digest"]] = item["verdict"]
        self._file = file.open("w" if again else "a", encoding="utf-8")

    def seconds(self, tree: Tree, tests: tuple[str, ...], limit_s: float) -> float | None:
        """Return what the tests take in the unchanged tree; None: they fail there, or never end."""
        if self._trusting:
            return 0.0
        for test in tests:  # each file or test by itself, once
            if test not in self._healthy:
                outcome = tree.run((test,), limit_s)
                self._healthy[test] = outcome.seconds if outcome.code == 0 else None
                if outcome.code != 0:
                    print(outcome.said, flush=True)
        taken = [self._healthy[test] for test in tests]
        return None if None in taken else sum(taken)

    def record(self, mutation: Mutation, digest: str, verdict: str, outcome: Outcome) -> None:
        """Add one line to the file."""
        line = {
            "digest": digest, "verdict": verdict, "area": mutation.area, "file": mutation.file,
            "new": mutation.new, "seconds": outcome.seconds, "code": outcome.code,
        }  # fmt: skip
        with self._lock:
            self.verdicts[digest] = verdict
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def verdict_of(outcome: Outcome) -> str:
    """Return killed (an endless loop, too), survived or, where no test ran at all, broken."""
    if outcome.code == 0:
        return "survived"
    return "broken" if outcome.code in (5, 70, 71) else "killed"  # none collected; forked.py's own


def _try(mutation: Mutation, tree: Tree, runs: _Runs, limit_s: float) -> tuple[str, Outcome]:
    try:
        changed = mutation.changed(tree.folder)
    except LookupError as error:
        return "not found", Outcome(None, 0.0, str(error))
    seconds = runs.seconds(tree, mutation.tests, limit_s)
    if seconds is None:
        return "broken", Outcome(None, 0.0, "its tests fail in the unchanged tree")
    file = tree.folder / mutation.file
    before = file.read_bytes()
    try:
        file.write_text(changed, encoding="utf-8")
        outcome = tree.run(mutation.tests, max(limit_s, _PATIENCE * seconds))
    finally:
        file.write_bytes(before)
    return verdict_of(outcome), outcome


def _work(queue: Queue[Mutation], folder: Path, runs: _Runs, limit_s: float, told: Counter) -> None:
    with Tree(folder) as tree:
        while True:
            try:
                mutation = queue.get_nowait()
            except Empty:
                return
            digest = mutation.digest(tree.folder)
            verdict, seconds = runs.verdicts.get(digest), ""
            if verdict is None:
                verdict, outcome = _try(mutation, tree, runs, limit_s)
                runs.record(mutation, digest, verdict, outcome)
                seconds = f" ({outcome.seconds:.1f} s)" if outcome.code is not None else ""
            told[verdict] += 1
            print(f"{verdict:9} {mutation.name}{seconds}", flush=True)


def _selected(only: Sequence[str]) -> list[Mutation]:
    """Return the entries of an area, or of files with such a part in their paths."""
    chosen = [
        mutation
        for mutation in read()
        if not only
        or any(word == mutation.area or ("/" in word and word in mutation.file) for word in only)
    ]
    if not chosen:
        sys.exit(f"error: no entry of {', '.join(only)}; areas: {', '.join(AREAS)}")
    return chosen


def main() -> int:
    """Try the chosen entries; return 1 if the tests did not notice one."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[], help="areas, or parts of paths that hold a slash"
    )
    parser.add_argument("--list", action="store_true", help="print the entries, run nothing")
    parser.add_argument("--again", action="store_true", help="forget the results of before")
    parser.add_argument(
        "--trusting", action="store_true",
        help="do not try the tests in the unchanged tree first: they have just passed",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="how many at the same time")
    parser.add_argument("--limit_s", type=float, default=120, help="what takes longer is killed")
    options = parser.parse_args()
    chosen = _selected(options.only)
    if options.list:
        for mutation in chosen:
            print(f"{mutation.name}\n  - {mutation.old.strip()}\n  + {mutation.new.strip()}")
        print(", ".join(f"{area} {number}" for area, number in counts(chosen).items()))
        return 0
    queue: Queue[Mutation] = Queue()
    for mutation in chosen:
        queue.put(mutation)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copies are removed
    runs, told = _Runs(_RESULTS, again=options.again, trusting=options.trusting), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        workers = [
            threading.Thread(
                target=_work, args=(queue, Path(folder) / str(number), runs, options.limit_s, told)
            )
            for number in range(options.jobs)
        ]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        finally:  # asked to stop: what is under way ends, nothing else begins
            with contextlib.suppress(Empty):
                while True:
                    queue.get_nowait()
            for worker in workers:
                worker.join()
    print(", ".join(f"{number} {verdict}" for verdict, number in sorted(told.items())))
    missing = len(chosen) - told.total()  # a worker that died leaves its own
    print(f"FIGURE mutations_survived {told['survived'] + missing}")
    return int(missing > 0 or any(told[verdict] for verdict in _UNSEEN))


if __name__ == "__main__":
    sys.exit(main())
