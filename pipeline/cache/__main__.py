"""`python -m pipeline.cache COMMAND`: what a cache is, whether it is whole, parts and sums."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from pipeline.errors import CacheError, ConfigError, run_command

if TYPE_CHECKING:
    from pipeline.cache.verify import Finding
    from pipeline.storage import Store

_PROG = "python -m pipeline.cache"
_URL = "a folder, or any address fsspec opens, such as s3://bucket/cache"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not given:
        print(parser.format_help(), end="")
        return 0
    try:
        options = parser.parse_args(given)
    except SystemExit as after_help:
        return int(after_help.code or 0)
    options.given = given
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


class _Parser(argparse.ArgumentParser):
    """Mistakes become one message of our kind instead of a usage text and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise what the user reads."""
        raise ConfigError(f"{self.prog}: {message}", do=f"see {self.prog} --help")


def _parser() -> _Parser:
    parser = _Parser(prog=_PROG, description=f"Look into a teacher cache. URL is {_URL}.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *addresses: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text}. URL is {_URL}.")
        sub.set_defaults(run=run)
        for address in addresses:
            sub.add_argument(address.lower(), metavar=address)
        return sub

    sub = command("inspect", _inspect, "what the cache holds, at a glance, finished or not", "URL")
    _add_json(sub)

    sub = command("verify", _verify, "read every file, compare checksums, decode every row", "URL")
    sub.add_argument("--quick", action="store_true", help="compare only the sizes of shards")
    _add_workers(sub)
    _add_json(sub)

    text = "entries, bytes by column, kept mass, entropy and the teacher's own loss, exactly"
    sub = command("stats", _stats, text, "URL")
    _add_workers(sub)
    _add_json(sub)

    text = (
        "make the damaged and missing files anew, to the same bytes, by the cache's own stage one"
    )
    sub = command("repair", _repair, text, "URL")
    sub.add_argument("--dry-run", action="store_true", help="say what would be done")
    _add_workers(sub)

    text = "a smaller cache: fewer entries a position, a subset of the samples, one split"
    sub = command("slice", _slice, text, "URL", "TARGET")
    sub.add_argument("--top-k", type=_count, metavar="K", help="only the K largest entries")
    part = sub.add_mutually_exclusive_group()
    part.add_argument(
        "--samples", type=_count, metavar="N", help="N samples, by a hash of their ids"
    )
    part.add_argument(
        "--fraction", type=_share, metavar="F", help="about this share of them, by the same hash"
    )
    part.add_argument("--ids", metavar="FILE", help="the samples of these ids, one a line")
    sub.add_argument(
        "--split",
        choices=("train", "heldout"),
        help="only this one; it becomes the training split of the new cache",
    )
    _add_workers(sub)

    text = "the sum of caches: parts of one, or whole ones of several teachers"
    sub = command("merge", _merge, text, "TARGET")
    sub.add_argument("urls", metavar="URL", nargs="+", help="the caches to put together")
    _add_workers(sub)

    text = "write plain list<int32> / list<float16> Parquet that any other trainer reads"
    sub = command("export", _export, text, "URL", "TO")
    sub.add_argument("--top-k", type=_count, metavar="K", help="only the K largest entries")
    return parser


def _add_json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print JSON for programs")


def _add_workers(sub: argparse.ArgumentParser) -> None:
    text = "shards read at one time (default: the cores, at most 8)"
    sub.add_argument("--workers", type=_count, metavar="N", help=text)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}, expected at least 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"found {value:g}, expected above 0 and at most 1")
    return value


def _inspect(options: argparse.Namespace) -> int:
    from pipeline.cache.summary import summarize, summary_lines
    from pipeline.storage import Store

    facts = summarize(Store(options.url))
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    for line in summary_lines(facts):
        print(line)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from pipeline.storage import Store

    store = Store(options.url)
    findings, shards = _findings(store, quick=options.quick, workers=options.workers)
    if options.json:
        listed = [{"file": store.full_url(f.name), "reason": f.reason} for f in findings]
        print(json.dumps({"url": store.url, "whole": not findings, "damaged": listed}, indent=1))
    else:
        for finding in findings:
            print(f"{store.full_url(finding.name)}: {finding.reason}")
    if findings:
        damaged = {finding.shard for finding in findings if finding.shard}
        raise CacheError(
            f"{options.url}: {len(findings)} files are damaged, "
            f"{max(0, shards - len(damaged))} shards are whole",
            do=f"run {_PROG} repair {options.url}; it makes only those anew",
        )
    if not options.json:
        print(f"{options.url}: {shards} shards whole{' in size' if options.quick else ''}")
    return 0


def _findings(store: Store, *, quick: bool, workers: int | None) -> tuple[list[Finding], int]:
    """Verify with a progress bar; return the findings and the number of shards."""
    from pipeline.cache.ledger import read_ledger
    from pipeline.cache.parallel import default_workers
    from pipeline.cache.verify import verify_cache

    with _rows_bar("verify") as bar:
        findings = verify_cache(
            store,
            quick=quick,
            workers=workers or default_workers(),
            on_start=bar.start,
            on_rows=bar.advance,
        )
    ledger = read_ledger(store)
    keys = {(record.split, record.index) for record in ledger.records}
    keys |= {(item.split, item.index) for item in ledger.planned}
    return findings, len(keys)


def _repair(options: argparse.Namespace) -> int:
    from pipeline.cache.repair import plan_repair, repair_cache, restore_manifest
    from pipeline.storage import Store

    store = Store(options.url)
    restore_manifest(store)
    findings, shards = _findings(store, quick=False, workers=options.workers)
    for finding in findings:
        print(f"{store.full_url(finding.name)}: {finding.reason}")
    plan = plan_repair(store, findings)
    if options.dry_run:
        for line in plan.lines():
            print(line)
        return 0
    sys.stdout.flush()
    answered = repair_cache(store, plan)
    left, _ = _findings(store, quick=True, workers=options.workers)
    left = [finding for finding in left if finding.name not in plan.leave]
    if left:
        names = ", ".join(finding.name for finding in left[:8])
        raise CacheError(
            f"{options.url}: {len(left)} files are damaged still: {names}",
            do="run verify for the reasons",
        )
    by_hand = f"; to be removed by hand: {', '.join(plan.leave)}" if plan.leave else ""
    own = f"; {answered} rows that were set aside are in it now" if answered else ""
    print(f"{options.url}: {len(findings)} files mended, {shards} shards whole{own}{by_hand}")
    return 0


def _stats(options: argparse.Namespace) -> int:
    from pipeline.cache.parallel import default_workers
    from pipeline.cache.reader import open_cache
    from pipeline.cache.stats import cache_stats, stats_lines

    cache = open_cache(options.url)
    with _rows_bar("stats") as bar:
        bar.start(sum(record.rows for record in cache.manifest.shards))
        workers = options.workers or default_workers()
        facts = cache_stats(cache, workers=workers, on_rows=bar.advance)
    for line in [json.dumps(facts, indent=1)] if options.json else stats_lines(facts):
        print(line)
    return 0


def _slice(options: argparse.Namespace) -> int:
    from pipeline.cache.parallel import default_workers
    from pipeline.cache.reader import open_cache
    from pipeline.cache.slice import SliceSpec, slice_cache
    from pipeline.storage import Store

    spec = SliceSpec(
        top_k=options.top_k,
        samples=options.samples,
        fraction=options.fraction,
        ids=None if options.ids is None else _read_ids(options.ids),
        split=options.split,
    )
    if spec == SliceSpec():
        raise ConfigError(
            "nothing to leave out", expected="--top-k, --samples, --fraction, --ids or --split"
        )
    with _rows_bar("slice") as bar:
        rows = slice_cache(
            open_cache(options.url),
            Store(options.target),
            spec,
            command=_command(options),
            workers=options.workers or default_workers(),
            on_start=bar.start,
            on_rows=bar.advance,
        )
    print(f"{options.target}: {rows} rows")
    return 0


def _merge(options: argparse.Namespace) -> int:
    from pipeline.cache.merge import merge_caches
    from pipeline.cache.parallel import default_workers
    from pipeline.storage import Store

    with _rows_bar("merge") as bar:
        rows = merge_caches(
            Store(options.target),
            options.urls,
            command=_command(options),
            workers=options.workers or default_workers(),
            on_start=bar.start,
            on_rows=bar.advance,
        )
    print(f"{options.target}: {rows} rows of {len(options.urls)} caches")
    return 0


def _read_ids(file: str) -> frozenset[str]:
    try:
        with open(file, encoding="utf-8") as lines:
            ids = frozenset(line.strip() for line in lines) - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ids {file}: cannot be read ({error})") from None
    if not ids:
        raise ConfigError(f"--ids {file}: no sample id in it", expected="one a line")
    return ids


def _command(options: argparse.Namespace) -> str:
    return shlex.join(["python", "-m", "pipeline.cache", *options.given])


def _export(options: argparse.Namespace) -> int:
    from pipeline.cache.export import export_plain
    from pipeline.cache.reader import open_cache
    from pipeline.storage import Store

    cache = open_cache(options.url)
    with _rows_bar("export") as bar:
        bar.start(sum(record.rows for record in cache.manifest.shards))
        rows = export_plain(cache, Store(options.to), top_k=options.top_k, on_rows=bar.advance)
    print(f"{options.to}: {rows} rows as plain lists")
    return 0


class _Bar:
    """A progress bar of rows, shown on terminals only."""

    def __init__(self, description: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(unit="rows", desc=description, disable=None)

    def start(self, rows: int) -> None:
        """Say how many there are; again for the next pass."""
        self.bar.reset(total=rows)

    def advance(self, rows: int) -> None:
        """Count rows that are done."""
        self.bar.update(rows)


@contextlib.contextmanager
def _rows_bar(description: str) -> Iterator[_Bar]:
    bar = _Bar(description)
    try:
        yield bar
    finally:
        bar.bar.close()


if __name__ == "__main__":
    sys.exit(run_command(main))
