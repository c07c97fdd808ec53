"""One run of a sweep as a process of its own: started, watched by its metrics file, stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config import dump_yaml
from pipeline.observe.metrics import METRICS_FILE, MetricRecord, read_metrics
from pipeline.storage import Store
from pipeline.storage.folder_lock import FolderLock
from pipeline.sweeps.plan import PlannedRun

__all__ = [
    "LOCK_FILE",
    "LOG_FILE",
    "POINT_FILE",
    "RunProcess",
    "add_seconds",
    "last_value",
    "run_lock",
    "seconds_spent",
]

LOG_FILE = "sweep.log"
POINT_FILE = "point.yaml"
LOCK_FILE = ".sweep.lock"
_SPENT_FILE = "sweep-seconds.json"


def run_lock(folder: Path) -> FolderLock:
    """Return the lock of a run's folder for one process and its child; the last of them ends it.

    A sweep that is killed leaves its runs behind alive. They go on, which is no loss, but a second
    process in the same folder would be; the child holds the lock for as long as it lives.
    """
    return FolderLock(folder, LOCK_FILE)


class RunProcess:
    """A run of stage two that has been started.

    Args:
        run: what is trained.
        command: the stage without its flags.
        environment: above this process's own.
        lock: taken; handed on to the child.
    """

    def __init__(
        self,
        run: PlannedRun,
        command: Sequence[str],
        environment: Mapping[str, str],
        lock: FolderLock,
    ) -> None:
        """Write the run's configuration and start it."""
        self.run = run
        self._started = time.monotonic()
        Store(str(run.folder)).write(POINT_FILE, dump_yaml(run.settings).encode())
        self._log = run.folder / LOG_FILE
        assert lock.handle is not None
        self._read = 0
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            # A session of its own: Ctrl-C reaches the sweep alone, which ends its runs in order.
            self._process = subprocess.Popen(
                [*command, "--config", str(run.folder / POINT_FILE)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                pass_fds=(lock.handle,),
                start_new_session=True,
            )
        lock.hand_to(self._process.pid)

    @property
    def exit_code(self) -> int | None:
        """The exit code, none while it runs."""
        return self._process.poll()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def new_records(self) -> list[MetricRecord]:
        """Return the metrics that were logged since the last call; from step 0 at the first."""
        file = self.run.folder / METRICS_FILE
        if not file.exists():
            return []
        records = list(read_metrics(file))
        # A resumed run cuts its file back first and logs those steps again.
        new = records[self._read :] if self._read <= len(records) else records
        self._read = len(records)
        return new

    def stop(self) -> None:
        """Ask the run to end: it finishes its step and writes a checkpoint first."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once; the last complete checkpoint stays."""
        self._signal(signal.SIGKILL)

    def failure(self) -> str:
        """Return why it failed: its own message, or its last words."""
        text = self._log.read_bytes()[self._log_start :].decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        words = said[-1] if said else (lines[-1] if lines else "it said nothing")
        return f"{how}: {words[:400]}"

    def _signal(self, number: int) -> None:
        # The whole session: a launcher's workers as well.
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


def last_value(folder: Path, key: str) -> float | None:
    """Return the last logged value of a metric, none where the run logged none."""
    file = folder / METRICS_FILE
    if not file.exists():
        return None
    found = [record.values[key] for record in read_metrics(file) if key in record.values]
    return found[-1] if found else None


def seconds_spent(folder: Path) -> float:
    """Return the seconds that earlier processes of this run took."""
    try:
        return float(json.loads((folder / _SPENT_FILE).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def add_seconds(folder: Path, seconds: float) -> None:
    """Note the seconds that a process of this run took."""
    content = json.dumps({"seconds": seconds_spent(folder) + seconds})
    Store(str(folder)).write(_SPENT_FILE, content.encode())
