"""A cache at a glance, finished or not: JSON-able facts, and the lines that show them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.cache.layout.card import responses_text
from pipeline.cache.layout.inventory import Ledger, read_ledger
from pipeline.cache.layout.manifest import MANIFEST, SPLITS, ShardRecord
from pipeline.cache.layout.quarantine import FAILED
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["summarize", "summary_lines"]


def summarize(store: Store) -> dict[str, Any]:
    """Return what the cache holds, from its manifest, or its plan and records; reads no shard.

    Raises:
        CacheError: there is no cache, its manifest or plan is damaged, or it is of a newer format.
    """
    ledger = read_ledger(store)
    if ledger.identity is None or (ledger.manifest is None and store.exists(MANIFEST)):
        names = " and ".join(name for name, _ in ledger.damaged)
        raise CacheError(
            f"{store.url}: {names} missing or damaged",
            do=f"python -m pipeline.cache verify {store.url} lists every damaged file",
        )
    identity = ledger.identity
    return {
        "url": store.url,
        "complete": ledger.manifest is not None,
        "identity_digest": ledger.identity_digest,
        "teacher": identity.get("teacher", {}),
        "scheme": identity.get("scheme", {}),
        "codec": identity.get("codec", {}),
        "corpus": identity.get("corpus", {}),
        "derived": identity.get("derived"),
        "rows_set_aside": ledger.rows_set_aside,
        "splits": {split: _split(ledger, split) for split in SPLITS},
    }


def _split(ledger: Ledger, split: str) -> dict[str, Any]:
    records = [record for record in ledger.records if record.split == split]
    planned = [item for item in ledger.planned if item.split == split]
    counted = sum(record.counted for record in records)
    whole = ledger.manifest is not None
    return {
        "shards": len(records),
        "shards_planned": len(records) if whole else len(planned),
        "sequences": sum(record.rows for record in records),
        "tokens": sum(record.tokens for record in records),
        "tokens_planned": sum(item.tokens for item in (records if whole else planned)),
        "counted_tokens": counted,
        "bytes": sum(record.bytes for record in records),
        "bytes_per_counted_token": sum(record.bytes for record in records) / max(counted, 1),
        "entries_per_position": sum(record.entries for record in records) / max(counted, 1),
        "kept_mass": _mean(records, [record.kept_mass for record in records]),
        "entropy_nats": _mean(records, [record.entropy for record in records]),
    }


def _mean(records: Sequence[ShardRecord], values: Sequence[float]) -> float:
    counted = [record.counted for record in records]
    total = sum(value * count for value, count in zip(values, counted, strict=True))
    return total / max(sum(counted), 1)


def summary_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of `inspect`."""
    teacher, scheme = facts["teacher"], dict(facts["scheme"])
    grid = scheme.pop("temperatures", [])
    name = scheme.pop("name", "unknown")
    yield f"cache        {facts['url']}"
    if not facts["complete"]:
        splits = facts["splits"].values()
        made, planned = (sum(s[key] for s in splits) for key in ("shards", "shards_planned"))
        tokens, of = (sum(s[key] for s in splits) for key in ("tokens", "tokens_planned"))
        share = 100 * tokens / max(of, 1)
        yield (
            f"state        incomplete: {made} of {planned} shards, {tokens} of {of} tokens "
            f"({share:.1f} %); the command that made it goes on"
        )
    yield f"identity     {facts['identity_digest']}"
    yield (
        f"teacher      {teacher.get('model')} ({teacher.get('dtype')}, "
        f"revision {teacher.get('revision')})"
    )
    if own := responses_text(facts):
        yield f"responses    {own}"
    yield (
        f"engine       {teacher.get('engine')} {teacher.get('engine_version')} "
        f"on {teacher.get('device')}"
    )
    yield f"scheme       {' '.join([name, *(f'{k}={_short(v)}' for k, v in scheme.items())])}"
    yield f"codec        {' '.join(f'{k}={_short(v)}' for k, v in facts['codec'].items())}"
    yield f"temperatures {', '.join(f'{value:g}' for value in grid)}"
    if facts["derived"]:
        derived = facts["derived"]
        sources = derived.get("from", [])
        sources = [sources] if isinstance(sources, str) else sources
        how = " ".join(f"{key}={value}" for key, value in derived.get("how", {}).items())
        yield f"derived      from {', '.join(source[:12] for source in sources)}: {how}"
    if facts["rows_set_aside"]:
        yield (
            f"set aside    {facts['rows_set_aside']} rows that the teacher could not answer, "
            f"listed in {FAILED}; cache-teacher --retry-quarantined makes them again"
        )
    for split, s in facts["splits"].items():
        yield (
            f"{split:<12} {s['shards']} shards, {s['sequences']} sequences, "
            f"{s['tokens']} tokens, {s['counted_tokens']} counted, "
            f"{s['bytes_per_counted_token']:.1f} bytes/counted token, "
            f"{s['entries_per_position']:.1f} entries/position, kept mass {s['kept_mass']:.4f}, "
            f"entropy {s['entropy_nats']:.3f} nats"
        )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ",".join(_short(item) for item in value)
    return str(value)
