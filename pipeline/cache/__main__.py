"""`python -m pipeline.cache COMMAND`: inspect, verify, repair, convert, push and pull caches."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.cache.tools.commands import HelpShown, parse, usage
from pipeline.errors import CacheError, ConfigError, run_command
from pipeline.program import command_name
from pipeline.progress import Progress

if TYPE_CHECKING:
    from pipeline.cache.tools.verify import Finding
    from pipeline.storage import Store


_EVERY_S = 10.0


def _progress(description: str) -> Progress:
    """Show rows; what takes less than ten seconds leaves no line in a log, which has the result."""
    return Progress(
        unit="rows",
        description=description,
        every_s=_EVERY_S,
        summary=False,
        emit=lambda line: print(line, file=sys.stderr, flush=True),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given:
        print(usage(), end="")
        return 0
    try:
        options = parse(given)
    except HelpShown as help_text:
        print(help_text, end="")
        return 0
    return _RUN[options.command](options)


def _say(line: str) -> None:
    """Print a line with words of the cache in it, which others may have written."""
    from pipeline.printable import printable

    print(printable(line))


def _inspect(options: argparse.Namespace) -> int:
    from pipeline.cache.tools.summary import summarize, summary_lines
    from pipeline.storage import Store

    facts = summarize(Store(options.url))
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    for line in summary_lines(facts):
        _say(line)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from pipeline.cache.layout.names import repair_advice
    from pipeline.storage import Store

    store = Store(options.url)
    findings, shards = _findings(store, check=options.check, workers=options.workers)
    if options.json:
        listed = [{"file": store.full_url(f.name), "reason": f.reason} for f in findings]
        print(json.dumps({"url": store.url, "intact": not findings, "damaged": listed}, indent=1))
    else:
        for finding in findings:
            _say(f"{store.full_url(finding.name)}: {finding.reason}")
    if findings:
        damaged = {finding.shard for finding in findings if finding.shard}
        raise CacheError(
            f"{options.url}: {len(findings)} files are damaged, "
            f"{max(0, shards - len(damaged))} shards are intact",
            do=repair_advice(options.url),
        )
    if not options.json:
        print(f"{options.url}: {shards} shards intact ({_CHECKS[options.check]})")
    return 0


_CHECKS = {
    "size": "sizes only",
    "checksum": "every byte compared",
    "decode": "every byte compared, every row decoded",
}


def _findings(store: Store, *, check: str, workers: int | None) -> tuple[list[Finding], int]:
    """Verify with a progress bar; return the findings and the number of shards."""
    from pipeline.cache.layout.inventory import read_inventory
    from pipeline.cache.tools.verify import verify_cache
    from pipeline.storage.parallel import default_workers

    def say_resumed(shards: int) -> None:
        print(
            f"verify: {shards} shards were compared by a run that was interrupted; the others "
            "follow",
            file=sys.stderr,
            flush=True,
        )

    with _progress("verify") as bar:
        findings = verify_cache(
            store,
            check=check,
            workers=workers or default_workers(),
            on_start=bar.start,
            on_rows=bar.advance,
            on_resume=say_resumed,
        )
    return findings, sum(read_inventory(store).shard_counts.values())


def _repair(options: argparse.Namespace) -> int:
    from pipeline.cache.tools.repair import plan_repair, repair_cache
    from pipeline.cache.tools.repair_backup import is_interrupted, restore
    from pipeline.storage import Store
    from pipeline.storage.parallel import default_workers

    store = Store(options.url)
    workers = options.workers or default_workers()
    if options.dry_run and is_interrupted(store):
        print(f"{options.url}: restore what an interrupted repair backed up, then go on with it")
        return 0
    restore(store)
    named = [] if options.shards is None else _planned(store, options.shards)
    findings: list[Finding] = []
    whole = 0
    if options.shards is None:
        findings, whole = _findings(store, check=options.check, workers=workers)
    for finding in findings:
        _say(f"{store.full_url(finding.name)}: {finding.reason}")
    plan = plan_repair(store, findings, named)
    if options.dry_run:
        for line in plan.lines():
            _say(line)
        if not findings and not named:
            print(
                f"{options.url}: {whole} shards intact ({_CHECKS[options.check]}); "
                "there is nothing to repair"
            )
        return 0
    sys.stdout.flush()
    answered = repair_cache(
        store, plan, workers=workers, trust_remote_code=options.trust_remote_code
    )
    left, shards = _findings(store, check="size", workers=workers)
    left = [finding for finding in left if finding.name not in plan.leave]
    if left:
        names = ", ".join(finding.name for finding in left[:8])
        raise CacheError(
            f"{options.url}: {len(left)} files are still damaged: {names}",
            do="run verify to see the reasons",
        )
    by_hand = f"; to be removed by hand: {', '.join(plan.leave)}" if plan.leave else ""
    own = f"; {answered} formerly quarantined rows are now in the cache" if answered else ""
    done = len(findings) or len(named)
    print(f"{options.url}: {done} files repaired, {shards} shards intact{own}{by_hand}")
    return 0


def _planned(store: Store, shards: Sequence[tuple[str, int]]) -> Sequence[tuple[str, int]]:
    """Return the shards that were named, which the cache must have."""
    from pipeline.cache.layout.inventory import read_inventory
    from pipeline.cache.layout.names import shard_label

    counts = read_inventory(store).shard_counts
    unknown = [shard_label(*key) for key in shards if key[1] >= counts.get(key[0], 0)]
    if unknown:
        held = ", ".join(f"{count} of {split}" for split, count in counts.items())
        raise ConfigError(
            f"--shards: {store.url} has no {', '.join(unknown)}",
            expected=f"shards of the cache, numbered from 0: {held}",
        )
    return shards


def _stats(options: argparse.Namespace) -> int:
    from pipeline.cache.io.reader import open_cache
    from pipeline.cache.tools.stats import cache_stats
    from pipeline.storage.parallel import default_workers

    cache = open_cache(options.url)
    with _progress("stats") as bar:
        bar.start(cache.manifest.total().rows)
        workers = options.workers or default_workers()
        facts = cache_stats(cache, workers=workers, on_rows=bar.advance)
    for line in [json.dumps(facts, indent=1)] if options.json else _stats_text(facts, options):
        _say(line)
    return 0


def _stats_text(facts: Mapping[str, Any], options: argparse.Namespace) -> Iterator[str]:
    from pipeline.cache.tools.stats import stats_lines

    return stats_lines(facts, columns=options.columns, shards=options.shards)


def _slice(options: argparse.Namespace) -> int:
    from pipeline.cache.io.reader import open_cache
    from pipeline.cache.tools.derive import check_order
    from pipeline.cache.tools.slice import SliceSpec, slice_cache
    from pipeline.storage import Store
    from pipeline.storage.parallel import default_workers

    check_order([options.source], options.target, "slice")
    spec = SliceSpec(
        top_k=options.top_k,
        tau_factor=options.tau_factor,
        samples=options.samples,
        fraction=options.fraction,
        ids=None if options.ids is None else _read_ids(options.ids),
        split=options.split,
    )
    if spec == SliceSpec():
        raise ConfigError(
            "no part of the cache was chosen",
            expected="--top-k, --tau-factor, --samples, --fraction, --ids or --split",
        )
    with _progress("slice") as bar:
        rows = slice_cache(
            open_cache(options.source),
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
    from pipeline.cache.tools.derive import check_order
    from pipeline.cache.tools.merge import merge_caches
    from pipeline.storage import Store
    from pipeline.storage.parallel import default_workers

    check_order(options.sources, options.target, "merge")
    with _progress("merge") as bar:
        rows = merge_caches(
            Store(options.target),
            options.sources,
            command=_command(options),
            workers=options.workers or default_workers(),
            on_start=bar.start,
            on_rows=bar.advance,
        )
    print(f"{options.target}: {rows} rows of {len(options.sources)} caches")
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
    return shlex.join([*command_name("pipeline.cache").split(), *options.given])


def _export(options: argparse.Namespace) -> int:
    from pipeline.cache.io.reader import open_cache
    from pipeline.cache.tools.derive import check_order
    from pipeline.cache.tools.export import export_plain
    from pipeline.storage import Store

    check_order([options.source], options.target, "export")
    cache = open_cache(options.source)
    with _progress("export") as bar:
        bar.start(cache.manifest.total().rows)
        rows = export_plain(
            cache,
            Store(options.target),
            top_k=options.top_k,
            command=_command(options),
            on_rows=bar.advance,
        )
    print(f"{options.target}: {rows} rows as plain lists")
    return 0


def _import(options: argparse.Namespace) -> int:
    from pipeline.cache.tools.foreign.command import run_import

    with _progress("import") as bar:
        said = run_import(
            options, command=_command(options), on_start=bar.start, on_rows=bar.advance
        )
    print(said)
    return 0


def _push(options: argparse.Namespace) -> int:
    from pipeline.cache.tools.travel.command import run_push

    with _progress("push") as bar:
        said = run_push(options, command=_command(options), on_start=bar.start, on_rows=bar.advance)
    print(said)
    return 0


def _pull(options: argparse.Namespace) -> int:
    from pipeline.cache.tools.travel.command import run_pull

    with _progress("pull") as bar:
        said = run_pull(options, on_start=bar.start, on_rows=bar.advance)
    print(said)
    return 0


_RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": _inspect,
    "verify": _verify,
    "stats": _stats,
    "repair": _repair,
    "slice": _slice,
    "merge": _merge,
    "export": _export,
    "import": _import,
    "push": _push,
    "pull": _pull,
}


if __name__ == "__main__":
    sys.exit(run_command(main))
