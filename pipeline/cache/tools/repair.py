"""Make damaged files of a cache again, to the same bytes: from other files, or by stage one.

Records follow from their shards and are written from these. Shards that are damaged become
*unrecorded* (`layout/fold.py`), and stage one runs as a separate process with the configuration in
the cache: it captures what has no record and nothing else. Nothing is lost before it has been
replaced: a damaged shard stays until its new bytes are written; the manifest, the records, damaged
files of responses and what stage one rewrites are backed up below `_meta/repair` until the end, and
all of them are restored when stage one fails.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.cache.io.segments import RecordReader
from pipeline.cache.io.tables import read_shard
from pipeline.cache.layout.fold import reopen
from pipeline.cache.layout.inventory import Inventory, read_inventory
from pipeline.cache.layout.names import (
    MANIFEST,
    PLAN,
    RECORDS,
    RESPONSES,
    SegmentName,
    parse_segment,
    shard_label,
)
from pipeline.cache.layout.quarantine import quarantine_name
from pipeline.cache.tools.checking.coverage import Finding, response_findings
from pipeline.cache.tools.checking.rebuild import rebuild_segment
from pipeline.cache.tools.repair_backup import (
    CONFIG,
    REWRITTEN,
    forget,
    keep,
    keep_responses,
    put_back,
    remove,
)
from pipeline.errors import CacheError, Interrupted
from pipeline.program import module_name
from pipeline.storage import Store

__all__ = [
    "RepairPlan",
    "plan_repair",
    "repair_cache",
    "run_stage_one",
]

_RESPONSES_LOST = "responses_quarantined"
"""Among the counts: the responses that the teacher could not write."""
_NUMBERED = re.compile(
    r"data/\w+/\d{5,}\.parquet|_meta/shards/\w+(-\d{5,}){1,2}\.parquet"
    r"|_meta/quarantine/\w+-\d{5,}\.json"
)


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What a repair will do; decided before anything is written."""

    rebuild: tuple[SegmentName, ...]
    """Files of records that are written again from their shards."""
    make: tuple[tuple[str, int], ...]
    """Shards for stage one."""
    remove: tuple[str, ...]
    """Small files that stage one writes again, and numbered files that belong to no shard."""
    leave: tuple[str, ...]
    """Files that belong to no shard and do not have a shard's name."""
    stage_one: bool

    def lines(self) -> Iterator[str]:
        """Yield what would be done, for `--dry-run`."""
        yield from (f"write again from the shards: {name.path}" for name in self.rebuild)
        yield from (f"compute again by stage one: {shard_label(*key)}" for key in self.make)
        yield from (f"remove: {name}" for name in self.remove)
        yield from (f"leave, to be removed by hand: {name}" for name in self.leave)
        if self.stage_one:
            yield "run stage one (stages.cache_teacher) with the cache's own configuration"


def plan_repair(
    store: Store, findings: Sequence[Finding], shards: Sequence[tuple[str, int]] = ()
) -> RepairPlan:
    """Decide how to repair each finding; writes nothing.

    Args:
        store: the cache's root.
        findings: of `verify_cache`.
        shards: to be made again, whatever was found.
    """
    inventory = read_inventory(store)
    names = {finding.name for finding in findings}
    strays = [finding.name for finding in findings if finding.stray]
    make = sorted({f.shard for f in findings if f.shard} | set(shards))
    meta = names - set(strays) - {f.name for f in findings if f.shard}
    rebuild: list[SegmentName] = []
    for name in sorted(meta):
        segment = _segment(name)
        if segment is not None:
            rebuild.append(segment)
            meta.discard(name)
    lists = [quarantine_name(shard_label(*key)) for key in make]
    # Stage one trusts an intact list, so a list of rows that are in the shard must go.
    remove = [name for name in lists if name in names and store.exists(name)]
    # Stage one makes these where they are missing, and trusts them where they are there.
    alone = {name for name in meta if name == PLAN or name.startswith(f"{RESPONSES}/")}
    remove += [name for name in sorted(alone) if store.exists(name)]
    # Stage one leaves all other files alone if it finds a manifest, and stops if it finds a damaged
    # manifest and no plan.
    if ((meta - alone and not make) or MANIFEST in meta) and store.exists(MANIFEST):
        remove.append(MANIFEST)
    if inventory.identity is None:
        strays = []  # what belongs to the cache is unknown
    return RepairPlan(
        rebuild=tuple(rebuild),
        make=tuple(make),
        remove=(*remove, *(name for name in strays if _NUMBERED.fullmatch(name))),
        leave=tuple(name for name in strays if not _NUMBERED.fullmatch(name)),
        stage_one=bool(make or meta),
    )


def _segment(name: str) -> SegmentName | None:
    folder, _, file = name.rpartition("/")
    return parse_segment(file) if folder == RECORDS else None


def repair_cache(
    store: Store,
    plan: RepairPlan,
    run: Callable[[Sequence[str]], int] | None = None,
    *,
    workers: int = 1,
    trust_remote_code: bool = False,
) -> int:
    """Carry out a plan; a second call continues an interrupted one.

    Args:
        store: the cache's root.
        plan: from `plan_repair`.
        run: runs stage one with these arguments and returns its exit code; `run_stage_one`.
        workers: shards read at one time where records are written again.
        trust_remote_code: whether stage one may run code of a model, if the configuration in the
            cache says so; whoever wrote the cache wrote that.

    Returns:
        The number of formerly quarantined rows that are in the cache now.

    Raises:
        CacheError: stage one fails with the cache's configuration, or it would run code of a model.
        Interrupted: the process was asked to stop.
    """
    inventory = read_inventory(store)
    make, same = list(plan.make), True
    for name in plan.rebuild:
        found, lost = rebuild_segment(store, name, inventory.shard_identity, workers=workers)
        make += lost
        same = same and found == _listed(inventory, name)
    if not (plan.stage_one or make or not same):
        remove(store, plan.remove)
        forget(store)
        return 0
    derived = "derived" in (inventory.identity or {})
    if derived:
        _open_derived(store, inventory, plan, make)
    _check_can_make(store, trust_remote_code=trust_remote_code)
    kept = keep(store, make)
    keep_responses(store, plan.remove)
    removed = remove(store, plan.remove)
    try:
        reopen(store, make)
        if not make and not same:
            store.delete(MANIFEST)  # of other records: it is written again, and no shard is
        code = _run_with_config(store, run or run_stage_one)
    except BaseException:
        put_back(store, removed)
        raise
    # With quarantined rows or responses stage one exits non-zero although the cache is complete.
    if code and not _is_finished(store, make, removed):
        put_back(store, removed)
        if code in (143, 130, -signal.SIGTERM):
            raise Interrupted(
                f"{store.url}: the repair was interrupted",
                do="run the same command again; it continues",
            )
        raise CacheError(
            f"{store.url}: stage one could not compute what is missing (exit code {code}; its "
            "message is above)",
            expected=f"the teacher and the corpus of {CONFIG}, on the same kind of machine",
            do="restore them and run the same command again; nothing else of the cache is lost",
        )
    for file in REWRITTEN:
        if file in kept:
            store.write(file, kept[file])
    before = kept.get(MANIFEST)
    forget(store)
    answered = 0
    if before is not None:
        answered = _rows_quarantined(json.loads(before)) - read_inventory(store).rows_quarantined
    if same and before is not None and answered <= 0 and store.read(MANIFEST) != before:
        raise CacheError(
            f"{store.url}: the cache is intact again, but its bytes differ from those before",
            do="the machine or the libraries differ; compare students of the two caches with care",
        )
    return max(answered, 0)


def _listed(inventory: Inventory, name: SegmentName) -> str | None:
    """Return the checksum by which the manifest knows a file of records."""
    segments = inventory.manifest.segments if inventory.manifest else ()
    return next((item.xxh3_128 for item in segments if item.name == name), None)


def _open_derived(
    store: Store, inventory: Inventory, plan: RepairPlan, make: Sequence[tuple[str, int]]
) -> None:
    """Make the damaged shards of a derived cache unrecorded, and say which command makes them.

    Raises:
        CacheError: always.
    """
    identity = inventory.identity or {}
    remove(store, plan.remove)
    reopen(store, make)
    store.delete(MANIFEST)
    how = identity["derived"].get("how", {}).get("command", "the command")
    raise CacheError(
        f"{store.url}: derived from another cache by `{how}`; stage one cannot compute it",
        do=f"run the same `{how}` command again (README.md of the cache has it); it writes "
        f"only what is damaged, now that {len(make)} shards are marked as missing",
    )


def run_stage_one(arguments: Sequence[str]) -> int:
    """Run stage one as a separate process; SIGTERM is passed on to it."""
    command = [sys.executable, "-m", module_name("stages.cache_teacher"), *arguments]
    with subprocess.Popen(command) as process, _forwarding(process):
        return process.wait()


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_with_config(store: Store, run: Callable[[Sequence[str]], int]) -> int:
    with tempfile.TemporaryDirectory(prefix="repair-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_bytes(store.read(CONFIG))
        return run(["--config", str(file), "--cache_dir", store.url])


def _check_can_make(store: Store, *, trust_remote_code: bool) -> None:
    if not store.exists(CONFIG):
        raise CacheError(
            f"{store.url}: holds no {CONFIG}, so how it was built is unknown",
            do="put that file back, or run its cache-teacher command with --verify",
        )
    if store.url.startswith("memory:"):
        raise CacheError(
            f"{store.url}: in the memory of this process, where stage one cannot write",
            expected="a folder or an object store",
        )
    if not trust_remote_code and _runs_code(store.read(CONFIG)):
        raise CacheError(
            f"{store.full_url(CONFIG)}: sets trust_remote_code, so stage one would run code that a "
            "model brings, because the cache says so",
            do="read that file, and repair with --trust-remote-code where you trust it and the "
            "model that it names",
        )


def _runs_code(config: bytes) -> bool:
    """Whether a configuration sets `trust_remote_code` anywhere; what is no YAML starts nothing."""
    try:
        waiting = [yaml.safe_load(config)]
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            for name, value in item.items():
                # Dotted names and numbers are read as well.
                if str(name).endswith("trust_remote_code") and value not in (False, None):
                    return True
                waiting.append(value)
    return False


def _rows_quarantined(manifest: Mapping[str, Any]) -> int:
    return int(manifest["corpus_counts"].get("rows_quarantined", 0))


def _is_finished(
    store: Store, make: Sequence[tuple[str, int]], removed: Mapping[str, bytes]
) -> bool:
    """Whether stage one finished and exited non-zero only because of quarantined rows."""
    inventory = read_inventory(store)
    if inventory.manifest is None or not (
        inventory.rows_quarantined or inventory.manifest.corpus_counts.get(_RESPONSES_LOST)
    ):
        return False
    if not all(finding.stray for finding in response_findings(store)):
        return False
    records = RecordReader(store, inventory.manifest)
    try:
        for key in make:
            read_shard(store, records.read(*key))
    except CacheError:
        return False
    return all(store.exists(name) for name in (PLAN, MANIFEST) if name in removed)
