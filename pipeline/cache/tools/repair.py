"""Damaged files of a cache made anew, to the same bytes: from what is left, or by stage one.

What the rest of the cache determines (a shard's record, `rows.bin`) is written from it. For the
rest the cache's own stage one runs as a process of its own, over the configuration in the cache;
it makes only what has no record. Nothing is lost before it has been replaced: a damaged shard stays
until its bytes are there, the manifest and the files that a stage writes anew are kept below
`_meta/repair` until the end, and all is put back when stage one cannot run.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.cache.io.tables import read_table
from pipeline.cache.io.writer import intact_record
from pipeline.cache.layout.inventory import Inventory, read_inventory
from pipeline.cache.layout.manifest import (
    MANIFEST,
    PLAN,
    ROWS,
    ShardRecord,
    checksum,
    decode_record,
    encode_record,
    pack_rows_index,
    record_name,
    shard_name,
)
from pipeline.cache.layout.quarantine import quarantine_name
from pipeline.cache.tools.verify import Finding
from pipeline.errors import CacheError, Interrupted
from pipeline.storage import Store

__all__ = ["RepairPlan", "plan_repair", "repair_cache", "restore_manifest", "run_stage_one"]

_CONFIG = "_meta/config.yaml"
_KEPT = "_meta/repair"
_REWRITTEN = ("README.md", _CONFIG)
"""Stage one writes them anew, with the command and the address of the repair."""


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What has to be done, decided before anything is."""

    rewrite: dict[str, bytes]
    """Files that the rest of the cache determines."""
    make: tuple[tuple[str, int], ...]
    """Shards for stage one."""
    remove: tuple[str, ...]
    """Small files that stage one writes anew, and numbered files that belong to no shard."""
    leave: tuple[str, ...]
    """Files that belong to no shard and are not named like one."""
    stage_one: bool

    def lines(self) -> Iterator[str]:
        """Yield what would be done, for `--dry-run`."""
        yield from (f"write anew from the rest of the cache: {name}" for name in self.rewrite)
        yield from (f"make anew by stage one: {split}/{index:05d}" for split, index in self.make)
        yield from (f"remove: {name}" for name in self.remove)
        yield from (f"leave, to be removed by hand: {name}" for name in self.leave)
        if self.stage_one:
            yield "run stage one (stages.cache_teacher) with the cache's own configuration"


def restore_manifest(store: Store) -> None:
    """Put back the manifest that an interrupted repair kept; what is missing is judged by it."""
    name = f"{_KEPT}/manifest.json"
    if store.exists(MANIFEST) or not store.exists(name):
        return
    identity = read_inventory(store).identity
    store.write(MANIFEST, store.read(name))
    try:
        same = identity in (None, read_inventory(store).identity)
    except CacheError:
        same = False
    if not same:  # the folder was cleared and used for another cache
        store.delete(MANIFEST)
        store.delete(name)


def plan_repair(store: Store, findings: Sequence[Finding]) -> RepairPlan:
    """Decide what each finding needs; reads, but writes nothing."""
    inventory = read_inventory(store)
    names = {finding.name for finding in findings}
    strays = [finding.name for finding in findings if finding.stray]
    numbered = re.compile(r"data/\w+/\d{5}\.parquet|_meta/(shards|quarantine)/\w+-\d{5}\.json")
    rewrite: dict[str, bytes] = {}
    make: list[tuple[str, int]] = []
    for key in sorted({f.shard for f in findings if f.shard}, key=lambda key: (key[0], key[1])):
        listed = _listed(inventory, key)
        record = None
        spoiled = {shard_name(*key), _failed_list(key)} & names
        if inventory.manifest is not None and listed is not None and not spoiled:
            record = _record_of(store, listed, inventory)
        if record is None:
            make.append(key)
        else:
            rewrite[record_name(*key)] = encode_record(record)
    meta = names - set(strays) - {f.name for f in findings if f.shard}
    if ROWS in meta and not make:
        packed = _rows_index(store, inventory, rewrite)
        if packed is not None:
            rewrite[ROWS] = packed
            meta.discard(ROWS)
    remove = [record_name(*key) for key in make if store.exists(record_name(*key))]
    # Stage one believes an intact list: of rows that are in the shard all the same, it must not.
    remove += [n for n in map(_failed_list, make) if n in names and store.exists(n)]
    remove += [PLAN] if PLAN in meta and store.exists(PLAN) else []
    # A stage that finds a manifest and every shard whole would leave the other files as they are;
    # one that finds a damaged manifest and no plan refuses.
    if ((meta - {PLAN} and not make) or MANIFEST in meta) and store.exists(MANIFEST):
        remove.append(MANIFEST)
    if inventory.identity is None:
        strays = []  # nobody knows what belongs to the cache
    return RepairPlan(
        rewrite=rewrite,
        make=tuple(make),
        remove=(*remove, *(name for name in strays if numbered.fullmatch(name))),
        leave=tuple(name for name in strays if not numbered.fullmatch(name)),
        stage_one=bool(make or meta),
    )


def repair_cache(
    store: Store, plan: RepairPlan, run: Callable[[Sequence[str]], int] | None = None
) -> int:
    """Carry out a plan; the same again goes on where it was interrupted.

    Args:
        store: the cache's root.
        plan: from `plan_repair`.
        run: runs stage one with these arguments and returns its exit code; `run_stage_one`.

    Returns:
        Rows that were quarantined before and that the teacher has answered now.

    Raises:
        CacheError: the cache's own configuration cannot make what is missing.
        Interrupted: asked to stop.
    """
    if plan.stage_one:
        _check_can_make(store)
    for name, data in plan.rewrite.items():
        store.write(name, data)
    if not plan.stage_one:
        _remove(store, plan.remove)
        _forget(store)
        return 0
    kept = _keep(store)
    removed = _remove(store, plan.remove)
    try:
        code = _run_with_config(store, run or run_stage_one)
    except BaseException:
        _put_back(store, removed)
        raise
    # With rows quarantined a run ends non-zero each time, and the cache is complete all the same.
    if code and not _is_finished(store, plan, removed):
        _put_back(store, removed)
        if code in (143, 130, -signal.SIGTERM):
            raise Interrupted(
                f"{store.url}: the repair was interrupted",
                do="run the same command again; it goes on",
            )
        raise CacheError(
            f"{store.url}: stage one could not make what is missing (exit code {code}; its message "
            "stands above)",
            expected=f"the teacher and the corpus that {_CONFIG} names, and the same machine kind",
            do="bring them back and run the same command again; nothing else of the cache is lost",
        )
    for name in _REWRITTEN:
        if name in kept:
            store.write(name, kept[name])
    before = kept.get(MANIFEST)
    _forget(store)
    answered = 0
    if before is not None:
        answered = _rows_quarantined(json.loads(before)) - read_inventory(store).rows_quarantined
    if before is not None and answered <= 0 and store.read(MANIFEST) != before:
        raise CacheError(
            f"{store.url}: the cache is whole again, but its bytes are not those of before",
            do="the teacher's machine or libraries differ; compare students across them with care",
        )
    return max(answered, 0)


def run_stage_one(arguments: Sequence[str]) -> int:
    """Run stage one as a process of its own; SIGTERM is handed on to it."""
    command = [sys.executable, "-m", "stages.cache_teacher", *arguments]
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
        file.write_bytes(store.read(_CONFIG))
        return run(["--config", str(file), "--cache_dir", store.url])


def _check_can_make(store: Store) -> None:
    identity = read_inventory(store).identity or {}
    if "derived" in identity:
        how = identity["derived"].get("how", {}).get("command", "the command")
        raise CacheError(
            f"{store.url}: derived from another cache by `{how}`; no stage one can make it",
            do=f"run the same `{how}` command again (README.md of the cache has it); it makes only "
            "what is damaged",
        )
    if not store.exists(_CONFIG):
        raise CacheError(
            f"{store.url}: holds no {_CONFIG}, so nobody knows how it was made",
            do="run the cache-teacher command that made it again; it makes only what is damaged",
        )
    if store.url.startswith("memory:"):
        raise CacheError(
            f"{store.url}: in the memory of this process, where stage one cannot write",
            expected="a folder or an object store",
        )


def _failed_list(key: tuple[str, int]) -> str:
    return quarantine_name(f"{key[0]}-{key[1]:05d}")


def _rows_quarantined(manifest: Mapping[str, Any]) -> int:
    return int(manifest["corpus_counts"].get("rows_quarantined", 0))


def _is_finished(store: Store, plan: RepairPlan, removed: Mapping[str, bytes]) -> bool:
    """Whether stage one made everything and ended non-zero only for rows that are quarantined."""
    inventory = read_inventory(store)
    return (
        inventory.manifest is not None
        and inventory.rows_quarantined > 0
        and all(store.exists(name) for name in (PLAN, MANIFEST) if name in removed)
        and all(intact_record(store, *key, check_bytes=True) is not None for key in plan.make)
    )


def _listed(inventory: Inventory, key: tuple[str, int]) -> ShardRecord | None:
    return next((r for r in inventory.records if (r.split, r.index) == key), None)


def _record_of(store: Store, listed: ShardRecord, inventory: Inventory) -> ShardRecord | None:
    """Return the record of a whole shard: the manifest has the sums, the shard has the rows."""
    try:
        table = read_table(store, listed, inventory.identity_digest)
    except CacheError:
        return None
    return replace(
        listed,
        row_tokens=tuple(table.column("num_tokens").to_pylist()),
        row_loss_tokens=tuple(table.column("num_loss_tokens").to_pylist()),
    )


def _rows_index(store: Store, inventory: Inventory, rewritten: dict[str, bytes]) -> bytes | None:
    """Return the content of `rows.bin` from all records, where it is what the manifest wants."""
    if inventory.manifest is None:
        return None
    records = []
    for listed in inventory.records:
        name = record_name(listed.split, listed.index)
        try:
            record = decode_record(rewritten.get(name) or store.read(name))
        except FileNotFoundError:
            record = None
        if record is None:
            return None
        records.append(record)
    packed = pack_rows_index(tuple(records))
    return packed if checksum(packed) == inventory.manifest.rows_xxh3_128 else None


def _keep(store: Store) -> dict[str, bytes]:
    """Copy what a stage writes anew; an earlier repair's copies are the older and stay."""
    kept: dict[str, bytes] = {}
    whole = read_inventory(store).manifest is not None
    for name in (*_REWRITTEN, *((MANIFEST,) if whole else ())):
        copy = f"{_KEPT}/{name.rsplit('/', 1)[-1]}"
        with contextlib.suppress(FileNotFoundError):
            store.create(copy, store.read(name))
            kept[name] = store.read(copy)
    return kept


def _forget(store: Store) -> None:
    for file in store.list(_KEPT):
        store.delete(f"{_KEPT}/{file}")


def _remove(store: Store, names: Sequence[str]) -> dict[str, bytes]:
    removed: dict[str, bytes] = {}
    for name in names:
        if not name.endswith(".parquet"):
            with contextlib.suppress(FileNotFoundError):
                removed[name] = store.read(name)
        store.delete(name)
    return removed


def _put_back(store: Store, removed: dict[str, bytes]) -> None:
    """Leave the cache as it was, but for what stage one has made in the meantime."""
    for name, data in removed.items():
        store.create(name, data)
    copy = f"{_KEPT}/manifest.json"
    if not store.exists(MANIFEST) and store.exists(copy):
        store.create(MANIFEST, store.read(copy))
