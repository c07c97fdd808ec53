"""`python -m pipeline.cache inspect | verify | export`: what a cache is, whole or not, as lists."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import CacheError, ConfigError, run_command

if TYPE_CHECKING:
    from pipeline.cache.manifest import ShardRecord
    from pipeline.cache.reader import Cache

_USAGE = """usage: python -m pipeline.cache COMMAND URL

commands:
  inspect URL   what the cache holds, at a glance
  verify URL    read every file, compare checksums, decode every row
  export URL TO write plain list<int32> / list<float16> Parquet that any other trainer reads

URL is a folder or any address fsspec opens, such as s3://bucket/cache."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    match args:
        case ["inspect", url]:
            return _inspect(url)
        case ["verify", url]:
            return _verify(url)
        case ["export", url, target]:
            return _export(url, target)
    raise ConfigError(
        f"pipeline.cache {' '.join(args)}: not a command",
        expected="inspect URL, verify URL or export URL TO",
    )


def _inspect(url: str) -> int:
    from pipeline.cache.card import responses_text
    from pipeline.cache.reader import open_cache

    manifest = open_cache(url).manifest
    identity = manifest.identity
    teacher = identity["teacher"]
    print(f"cache        {url}")
    print(f"identity     {manifest.identity_digest}")
    print(f"teacher      {teacher['model']} ({teacher['dtype']}, revision {teacher['revision']})")
    print(f"engine       {teacher['engine']} {teacher['engine_version']} on {teacher['device']}")
    if own := responses_text(identity):
        print(f"responses    {own}")
    print(f"scheme       {identity['scheme']['name']} {identity['scheme']['top_k']}")
    print(f"temperatures {', '.join(f'{value:g}' for value in manifest.temperatures)}")
    for split in ("train", "heldout"):
        records = manifest.of_split(split)
        counted = sum(record.counted for record in records)
        size = sum(record.bytes for record in records)
        kept = sum(record.kept_mass * record.counted for record in records) / max(counted, 1)
        entropy = sum(record.entropy * record.counted for record in records) / max(counted, 1)
        print(
            f"{split:<12} {len(records)} shards, {sum(r.rows for r in records)} sequences, "
            f"{sum(r.tokens for r in records)} tokens, {counted} counted, "
            f"{size / max(counted, 1):.1f} bytes/counted token, kept mass {kept:.4f}, "
            f"entropy {entropy:.3f} nats"
        )
    return 0


def _verify(url: str) -> int:
    from pipeline.cache.reader import open_cache

    cache = open_cache(url)
    damaged: list[str] = []
    try:
        cache.tokenizer_files()
    except CacheError as error:
        damaged.append(error.found)
    checked = 0
    for split in ("train", "heldout"):
        source = cache.source(split)
        for shard, rows in enumerate(source.shard_rows()):
            try:
                decoded = source.read_rows(shard, range(rows))
                counted = sum(row.targets.num_positions for row in decoded)
                if counted != source.shards[shard].counted:
                    raise CacheError(f"{source.shards[shard].path}: {counted} counted tokens")
                _check_record(cache, source.shards[shard])
                checked += 1
            except CacheError as error:
                damaged.append(error.found)
    for line in damaged:
        print(line)
    if damaged:
        raise CacheError(
            f"{url}: {len(damaged)} files are damaged, {checked} shards are whole",
            do="run the cache-teacher command that made this cache again; it makes only those anew",
        )
    print(f"{url}: {checked} shards whole")
    return 0


def _export(url: str, target: str) -> int:
    from tqdm import tqdm

    from pipeline.cache.export import export_plain
    from pipeline.cache.reader import open_cache
    from pipeline.storage import Store

    cache = open_cache(url)
    total = sum(record.rows for record in cache.manifest.shards)
    with tqdm(total=total, unit="rows", desc="export", disable=None) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        rows = export_plain(cache, Store(target), on_rows=advance)
    print(f"{target}: {rows} rows as plain lists")
    return 0


def _check_record(cache: Cache, listed: ShardRecord) -> None:
    """Compare a shard's record file with the manifest; a cache made again would rely on it."""
    from pipeline.cache.manifest import record_name
    from pipeline.cache.writer import intact_record

    name = record_name(listed.split, listed.index)
    record = intact_record(cache.store, listed.split, listed.index, check_bytes=False)
    if record is None or record.to_json(with_rows=False) != listed.to_json(with_rows=False):
        raise CacheError(f"{cache.store.full_url(name)}: shard record missing or damaged")


if __name__ == "__main__":
    sys.exit(run_command(main))
