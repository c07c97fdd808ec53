"""Write damaged files of a cache again, to the same bytes: from other files, or by stage one.

Files that other files determine (a shard's record, `rows.bin`) are written from those. For all
others stage one runs as a separate process, with the configuration in the cache; it computes only
shards without a record. Nothing is deleted before it has been replaced: a damaged shard stays until
its new bytes are written, the manifest and the files that stage one rewrites are backed up below
`_meta/repair` until the end, and all of them are restored when stage one fails.
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
"""Stage one writes these again, with the command and the address of the repair."""


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What a repair will do; decided before anything is written."""

    rewrite: dict[str, bytes]
    """Files that other files of the cache determine."""
    make: tuple[tuple[str, int], ...]
    """Shards for stage one."""
    remove: tuple[str, ...]
    """Small files that stage one writes again, and numbered files that belong to no shard."""
    leave: tuple[str, ...]
    """Files that belong to no shard and do not have a shard's name."""
    stage_one: bool

    def lines(self) -> Iterator[str]:
        """Yield what would be done, for `--dry-run`."""
        yield from (f"write again from the rest of the cache: {name}" for name in self.rewrite)
        yield from (
            f"compute again by stage one: {split}/{index:05d}" for split, index in self.make
        )
        yield from (f"remove: {name}" for name in self.remove)
        yield from (f"leave, to be removed by hand: {name}" for name in self.leave)
        if self.stage_one:
            yield "run stage one (stages.cache_teacher) with the cache's own configuration"


def restore_manifest(store: Store) -> None:
    """Restore the manifest that an interrupted repair backed up; it lists all shards."""
    name = f"{_KEPT}/manifest.json"
    if store.exists(MANIFEST) or not store.exists(name):
        return
    identity = read_inventory(store).identity
    store.write(MANIFEST, store.read(name))
    try:
        same = identity in (None, read_inventory(store).identity)
    except CacheError:
        same = False
    if not same:  # the folder was emptied and used for another cache
        store.delete(MANIFEST)
        store.delete(name)


def plan_repair(store: Store, findings: Sequence[Finding]) -> RepairPlan:
    """Decide how to repair each finding; writes nothing."""
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
    # Stage one trusts an intact list, so a list of rows that are in the shard must go.
    remove += [n for n in map(_failed_list, make) if n in names and store.exists(n)]
    remove += [PLAN] if PLAN in meta and store.exists(PLAN) else []
    # Stage one leaves all other files alone if it finds a manifest and every shard intact, and
    # stops if it finds a damaged manifest and no plan.
    if ((meta - {PLAN} and not make) or MANIFEST in meta) and store.exists(MANIFEST):
        remove.append(MANIFEST)
    if inventory.identity is None:
        strays = []  # what belongs to the cache is unknown
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
    """Carry out a plan; a second call continues an interrupted one.

    Args:
        store: the cache's root.
        plan: from `plan_repair`.
        run: runs stage one with these arguments and returns its exit code; `run_stage_one`.

    Returns:
        The number of formerly quarantined rows that are in the cache now.

    Raises:
        CacheError: stage one fails with the cache's configuration.
        Interrupted: the process was asked to stop.
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
    # With quarantined rows stage one exits non-zero although the cache is complete.
    if code and not _is_finished(store, plan, removed):
        _put_back(store, removed)
        if code in (143, 130, -signal.SIGTERM):
            raise Interrupted(
                f"{store.url}: the repair was interrupted",
                do="run the same command again; it continues",
            )
        raise CacheError(
            f"{store.url}: stage one could not compute what is missing (exit code {code}; its "
            "message is above)",
            expected=f"the teacher and the corpus of {_CONFIG}, on the same kind of machine",
            do="restore them and run the same command again; nothing else of the cache is lost",
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
            f"{store.url}: the cache is intact again, but its bytes differ from those before",
            do="the machine or the libraries differ; compare students of the two caches with care",
        )
    return max(answered, 0)


def run_stage_one(arguments: Sequence[str]) -> int:
    """Run stage one as a separate process; SIGTERM is passed on to it."""
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
            f"{store.url}: derived from another cache by `{how}`; stage one cannot compute it",
            do=f"run the same `{how}` command again (README.md of the cache has it); it writes "
            "only what is damaged",
        )
    if not store.exists(_CONFIG):
        raise CacheError(
            f"{store.url}: holds no {_CONFIG}, so how it was built is unknown",
            do="run its cache-teacher command again; it computes only what is damaged",
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
    """Whether stage one finished and exited non-zero only because of quarantined rows."""
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
    """Return the record of an intact shard: sums from the manifest, rows from the shard."""
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
    """Return the content of `rows.bin` from all records, if it has the manifest's checksum."""
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
    """Back up what stage one will rewrite; backups of an interrupted repair are older and stay."""
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
    """Restore the cache, except for what stage one has written in the meantime."""
    for name, data in removed.items():
        store.create(name, data)
    copy = f"{_KEPT}/manifest.json"
    if not store.exists(MANIFEST) and store.exists(copy):
        store.create(MANIFEST, store.read(copy))
