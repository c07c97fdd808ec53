"""A summary of a cache, complete or not: as JSON, and as lines of text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pipeline.amounts import BYTES_PER_TOKEN, bytes_per_token, format_kept_mass
from pipeline.cache.layout.card import responses_text
from pipeline.cache.layout.inventory import Inventory, read_inventory, recorded_totals
from pipeline.cache.layout.manifest import Totals
from pipeline.cache.layout.names import MANIFEST, SPLITS, repair_advice
from pipeline.cache.layout.quarantine import QUARANTINE
from pipeline.errors import CacheError
from pipeline.storage import Store

__all__ = ["summarize", "summary_lines"]


def summarize(store: Store) -> dict[str, Any]:
    """Return what the cache holds, from its manifest, or plan and records; reads no shard.

    Raises:
        CacheError: there is no cache, its manifest or plan is damaged, or it is of a newer format.
    """
    inventory = read_inventory(store)
    if inventory.identity is None or (inventory.manifest is None and store.exists(MANIFEST)):
        names = " and ".join(name for name, _ in inventory.damaged)
        raise CacheError(
            f"{store.url}: {names} missing or damaged",
            do=repair_advice(store.url),
        )
    identity, totals = inventory.identity, recorded_totals(store, inventory)
    return {
        "url": store.url,
        "complete": inventory.manifest is not None,
        "identity_digest": inventory.identity_digest,
        "teacher": identity.get("teacher", {}),
        "scheme": identity.get("scheme", {}),
        "codec": identity.get("codec", {}),
        "corpus": identity.get("corpus", {}),
        "corpus_counts": inventory.manifest.corpus_counts if inventory.manifest else {},
        "derived": identity.get("derived"),
        "imported": identity.get("imported"),
        "rows_quarantined": inventory.rows_quarantined,
        "splits": {split: _split(inventory, split, totals[split]) for split in SPLITS},
    }


def _split(inventory: Inventory, split: str, total: Totals) -> dict[str, Any]:
    shards, tokens = _planned(inventory, split, total)
    return {
        "shards": total.shards,
        "shards_planned": shards,
        "sequences": total.rows,
        "tokens": total.tokens,
        "tokens_planned": tokens,
        "loss_tokens": total.loss_tokens,
        "bytes": total.bytes,
        "bytes_per_loss_token": bytes_per_token(total.bytes, total.loss_tokens),
        "entries_per_position": total.entries / max(total.loss_tokens, 1),
        "kept_mass": total.kept_mass,
        "entropy_nats": total.entropy,
    }


def _planned(inventory: Inventory, split: str, total: Totals) -> tuple[int | None, int | None]:
    """Return shards and tokens of the plan; None: stage one's says no tokens, at first no shards.

    A complete cache is what was planned.
    """
    if inventory.manifest is not None:
        return total.shards, total.tokens
    shards = inventory.plan_counts.get(split, 0) if inventory.plan_counts else None
    if not inventory.planned:
        return shards, None
    return shards, sum(item.tokens for item in inventory.planned if item.split == split)


def _progress(splits: Collection[Mapping[str, Any]]) -> str:
    """Say how much of an incomplete cache is there, as far as its plan tells."""

    def summed(key: str) -> int | None:
        values = [split[key] for split in splits]
        return None if None in values else sum(values)

    planned, of = summed("shards_planned"), summed("tokens_planned")
    shards, tokens = (sum(split[key] for split in splits) for key in ("shards", "tokens"))
    if planned is None:
        return f"{shards} shards so far"
    if of is None:
        return f"{shards} of {planned} shards"
    share = 100 * tokens / max(of, 1)
    return f"{shards} of {planned} shards, {tokens} of {of} tokens ({share:.1f} %)"


def summary_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of `inspect`."""
    teacher, scheme = facts["teacher"], dict(facts["scheme"])
    grid = scheme.pop("temperatures", [])
    name = scheme.pop("name", "unknown")
    yield f"cache        {facts['url']}"
    if not facts["complete"]:
        made = _progress(facts["splits"].values())
        yield f"state        incomplete: {made}; its cache-teacher command continues it"
    yield f"identity     {facts['identity_digest']}"
    yield (
        f"teacher      {teacher.get('model')} ({teacher.get('dtype')}, "
        f"revision {teacher.get('revision')})"
    )
    if own := responses_text(facts, facts["corpus_counts"]):
        yield f"responses    {own}"
    yield (
        f"engine       {teacher.get('engine')} {teacher.get('engine_version')} "
        f"on {teacher.get('device')}"
    )
    yield f"scheme       {name}{''.join(f', {part}' for part in _parts(scheme))}"
    yield f"codec        {', '.join(_parts(facts['codec']))}"
    yield f"temperatures {', '.join(f'{value:g}' for value in grid)}"
    if facts["derived"]:
        derived = facts["derived"]
        sources = derived.get("from", [])
        sources = [sources] if isinstance(sources, str) else sources
        how = ", ".join(_parts(derived.get("how", {})))
        yield f"derived      from {', '.join(source[:12] for source in sources)}: {how}"
    if facts.get("imported"):
        yield f"not known    {'; '.join(facts['imported']['unknown'])}"
    if facts["rows_quarantined"]:
        yield (
            f"quarantined  {facts['rows_quarantined']} rows that the teacher fails on, "
            f"listed in {QUARANTINE}; cache-teacher --retry-quarantined tries them again"
        )
    for split, s in facts["splits"].items():
        counts = (
            f"{split:<12} {s['shards']} shards, {s['sequences']} sequences, "
            f"{s['tokens']} tokens, {s['loss_tokens']} supervised"
        )
        means = (
            f"{s['bytes_per_loss_token']:.1f} {BYTES_PER_TOKEN}, "
            f"{s['entries_per_position']:.1f} entries/position, "
            f"kept mass {format_kept_mass(s['kept_mass'])}, entropy {s['entropy_nats']:.3f} nats"
        )
        yield f"{counts}, {means}" if s["loss_tokens"] else counts


def _parts(values: Mapping[str, Any], under: str = "") -> Iterator[str]:
    """Yield `name value` of each setting, of settings within settings by their dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _parts(value, f"{under}{name}.")
        else:
            yield f"{under}{name} {_short(value)}"


def _short(value: Any) -> str:
    """Return a value as a configuration file has it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):  # in a list
        return "(" + ", ".join(_parts(value)) + ")"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "/".join(_short(item) for item in value)
    return str(value)
