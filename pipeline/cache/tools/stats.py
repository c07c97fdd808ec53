"""Statistics of a cache: entries, bytes by column, kept mass, entropy, the teacher's own loss.

Percentiles are exact in fixed memory: entry counts are 16-bit integers and the statistics are
float16, so that a histogram has at most 65,536 bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.amounts import BYTES_PER_TOKEN, bytes_per_token, format_kept_mass
from pipeline.cache.io.reader import Cache
from pipeline.cache.io.tables import decode_table, read_shard, table_from_bytes, tail_mass
from pipeline.cache.layout.names import SPLITS, repair_advice
from pipeline.cache.layout.records import ShardRecord
from pipeline.errors import CacheError
from pipeline.storage.parallel import in_threads

__all__ = ["Tally", "cache_stats", "stats_lines"]

_BINS = 1 << 16
_ROUNDING = 1e-6
"""Of a mass of 1 that is summed from float32 log-probs."""
_TEXT = ("sample_id", "num_tokens", "num_loss_tokens", "input_ids", "loss_mask")
"""Columns of the text; all others are the targets'."""


@dataclass(slots=True)
class Tally:
    """Sums and histograms over supervised positions; two of them add up."""

    rows: int = 0
    tokens: int = 0
    label_logprob: float = 0.0
    """Sum of log p of the labels."""
    label_kept: int = 0
    """Positions whose label is among the entries."""
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    """Positions by number of entries."""
    tails: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    """Positions by the bits of the float16 mass outside the entries."""
    entropies: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    """Positions by the bits of the float16 entropy at temperature 1."""
    mass_above_one: int = 0
    """Positions whose always-kept entries, as read, sum to more than 1 at temperature 1."""
    most_mass: float = 0.0
    """The largest of these sums."""
    data_bytes: int = 0
    """Of the shards' files."""
    bytes_by_column: dict[str, int] = field(default_factory=dict)
    """Compressed sizes, from the Parquet footer; the rest of the file is footer and headers."""

    def add(self, other: Tally) -> None:
        """Add another's numbers to these."""
        self.rows += other.rows
        self.tokens += other.tokens
        self.label_logprob += other.label_logprob
        self.label_kept += other.label_kept
        self.mass_above_one += other.mass_above_one
        self.most_mass = max(self.most_mass, other.most_mass)
        self.data_bytes += other.data_bytes
        self.counts += other.counts
        self.tails += other.tails
        self.entropies += other.entropies
        for name, size in other.bytes_by_column.items():
            self.bytes_by_column[name] = self.bytes_by_column.get(name, 0) + size

    def to_json(self) -> dict[str, Any]:
        """Return the statistics, all over supervised positions at temperature 1."""
        loss_tokens = int(self.counts.sum())
        grid = np.arange(_BINS, dtype=np.float64)
        halves = np.arange(_BINS, dtype=np.uint16).view(np.float16).astype(np.float64)
        by_count = _Distribution(grid, self.counts)
        tail, entropy = _Distribution(halves, self.tails), _Distribution(halves, self.entropies)
        each = max(loss_tokens, 1)
        columns = {name: size / each for name, size in sorted(self.bytes_by_column.items())}
        text = sum(columns.get(name, 0.0) for name in _TEXT)
        targets = sum(columns.values()) - text
        total = bytes_per_token(self.data_bytes, loss_tokens)
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "loss_tokens": loss_tokens,
            "entries_per_position": {
                "mean": by_count.mean(),
                "p50": by_count.quantile(0.5),
                "p95": by_count.quantile(0.95),
                "max": by_count.quantile(1.0),
            },
            "bytes_per_loss_token": {
                "all": total,
                "targets": targets if loss_tokens else 0.0,
                "text": text if loss_tokens else 0.0,
                "file": total - targets - text if loss_tokens else 0.0,
                "columns": columns if loss_tokens else {},
            },
            "kept_mass": {"mean": 1 - tail.mean(), "p5": 1 - tail.quantile(0.95)},
            "always_kept_mass_above_one": {
                "share": self.mass_above_one / each,
                "by_at_most": max(self.most_mass - 1, 0.0),
            },
            "entropy_nats": {
                "mean": entropy.mean(),
                **{f"p{q}": entropy.quantile(q / 100) for q in (5, 50, 95)},
            },
            "label_logprob": self.label_logprob / each,
            "teacher_cross_entropy": 0.0 - self.label_logprob / each,
            "label_within_entries": self.label_kept / each,
        }


class _Distribution:
    """Values and how often each occurs."""

    def __init__(self, values_B: NDArray[np.float64], times_B: NDArray[np.int64]) -> None:
        used = np.flatnonzero(times_B)
        order = used[np.argsort(values_B[used], kind="stable")]
        self.values, self.times = values_B[order], times_B[order]

    def mean(self) -> float:
        return float((self.values * self.times).sum() / max(self.times.sum(), 1))

    def quantile(self, q: float) -> float:
        """Return the smallest value with at least the share q of all at or below it; 0 if empty."""
        if not self.times.size:
            return 0.0
        reached = np.cumsum(self.times)
        return float(self.values[np.searchsorted(reached, q * reached[-1] * (1 - 1e-12))])


def cache_stats(
    cache: Cache, *, workers: int = 1, on_rows: Callable[[int], None] = lambda rows: None
) -> dict[str, Any]:
    """Return the statistics of each split and each shard; reads and decodes everything.

    Raises:
        CacheError: a shard is missing or damaged; the message names it.
    """

    def take(record: ShardRecord) -> Tally:
        return _tally(cache, record)

    totals = {split: Tally() for split in SPLITS}
    shards: list[dict[str, Any]] = []
    records = cache.records()
    for record, tally in zip(records, in_threads(take, records, workers), strict=True):
        totals[record.split].add(tally)
        shards.append({"shard": record.path, **tally.to_json()})
        on_rows(record.rows)
    return {
        "url": cache.store.url,
        "identity_digest": cache.manifest.identity_digest,
        "splits": {split: totals[split].to_json() for split in SPLITS},
        "shards": shards,
    }


def _tally(cache: Cache, record: ShardRecord) -> Tally:
    try:
        data = read_shard(cache.store, record)
        table = table_from_bytes(data, cache.manifest.shard_identity)
        tally = _count(table, at_one=cache.manifest.temperatures.index(1.0))
    except CacheError as error:
        raise CacheError(
            f"{cache.store.full_url(record.path)}: shard damaged: {error.found}",
            do=repair_advice(cache.store.url),
        ) from None
    tally.data_bytes = len(data)
    metadata = pq.read_metadata(pa.BufferReader(data))
    for group in range(metadata.num_row_groups):
        for position in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(position)
            name = str(chunk.path_in_schema).split(".")[0]
            sizes = tally.bytes_by_column
            sizes[name] = sizes.get(name, 0) + int(chunk.total_compressed_size)
    return tally


def _count(table: pa.Table, *, at_one: int) -> Tally:
    tally = Tally(rows=table.num_rows)
    counts = [np.zeros(0, np.int32)]
    entropies = [np.zeros(0, np.float16)]
    for row in decode_table(table):
        targets = row.targets
        tally.tokens += int(row.input_ids_L.size)
        counts.append(targets.counts_N)
        entropies.append(targets.entropy_NG[:, at_one].astype(np.float16))
        tally.label_logprob += float(targets.label_logprob_N.sum(dtype=np.float64))
        owner_E = np.repeat(np.arange(targets.num_positions), targets.counts_N)
        p_E = np.exp(targets.logprobs_E, dtype=np.float64)
        if targets.inclusion_E is not None:
            p_E *= targets.inclusion_E >= 1
        mass_N = np.bincount(owner_E, p_E, targets.num_positions)
        tally.mass_above_one += int((mass_N > 1 + _ROUNDING).sum())
        tally.most_mass = max(tally.most_mass, float(mass_N.max(initial=0.0)))
        label_E = row.input_ids_L[row.loss_mask_L][owner_E]
        tally.label_kept += np.unique(owner_E[targets.token_ids_E == label_E]).size
    tally.counts += np.bincount(np.concatenate(counts), minlength=_BINS)
    tally.entropies += _by_bits(np.concatenate(entropies))
    tally.tails += _by_bits(tail_mass(table))
    return tally


def _by_bits(values: NDArray[Any]) -> NDArray[np.int64]:
    bits = np.ascontiguousarray(values, dtype=np.float16).view(np.uint16)
    return np.bincount(bits, minlength=_BINS).astype(np.int64)


def stats_lines(
    facts: Mapping[str, Any], *, columns: bool = False, shards: bool = False
) -> Iterator[str]:
    """Yield the tables of `stats`: one of the splits, one of the shards.

    Args:
        facts: of `cache_stats`.
        columns: whether the bytes of each column of the files are listed too.
        shards: whether each shard is listed, however many there are.
    """
    splits = {name: s for name, s in facts["splits"].items() if s["rows"]}
    yield f"cache {facts['url']}, identity {facts['identity_digest'][:12]}"
    yield ""
    yield f"{'':<{_LABEL}}" + "".join(f"{name:>14}" for name in splits)
    rows = list(_ROWS)
    if columns:
        names = sorted({n for s in splits.values() for n in s["bytes_per_loss_token"]["columns"]})
        rows += [(f"  bytes in {n}", ("bytes_per_loss_token", "columns", n), ".2f") for n in names]
    for label, path, digits in rows:
        yield f"{label:<{_LABEL}}" + "".join(
            f"{_shown(s, path, digits):>14}" for s in splits.values()
        )
    yield ""
    listed = facts["shards"]
    if not shards and len(listed) > _SHARDS_LISTED:
        yield f"{len(listed)} shards; --shards lists the numbers of each"
        return
    yield (
        f"{'shard':<28}{'rows':>8}{'tokens':>11}{'supervised':>12}{'entries':>9}{'bytes':>9}"
        f"{'kept mass':>12}{'entropy':>9}{'loss':>9}"
    )
    for s in listed:
        cells = [_shown(s, path, digits) for path, digits in _SHARD_CELLS]
        widths = (9, 9, 12, 9, 9)
        yield (
            f"{s['shard']:<28}{s['rows']:>8}{s['tokens']:>11}{s['loss_tokens']:>12}"
            + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        )


_LABEL = 54
_SHARDS_LISTED = 16
_MASS = "mass"
_Row = tuple[str, tuple[str, ...], str]
# What is asked first: how much there is, what it costs, how good the teacher and the targets are.
_ROWS: list[_Row] = [
    ("rows", ("rows",), ""),
    ("tokens", ("tokens",), ""),
    ("supervised tokens", ("loss_tokens",), ""),
    (BYTES_PER_TOKEN, ("bytes_per_loss_token", "all"), ".1f"),
    ("  of them the targets", ("bytes_per_loss_token", "targets"), ".1f"),
    ("  the text: ids, loss mask, names", ("bytes_per_loss_token", "text"), ".1f"),
    ("  footers and headers of the files", ("bytes_per_loss_token", "file"), ".1f"),
    ("teacher's own cross-entropy (nats)", ("teacher_cross_entropy",), ".4f"),
    ("label within the entries (share of positions)", ("label_within_entries",), ".4f"),
    *[(f"kept mass, {n}", ("kept_mass", n), _MASS) for n in ("mean", "p5")],
    (
        "always-kept mass above 1 as read (share of positions)",
        ("always_kept_mass_above_one", "share"),
        ".4f",
    ),
    ("  by at most", ("always_kept_mass_above_one", "by_at_most"), ".4f"),
    ("entries/position, mean", ("entries_per_position", "mean"), ".1f"),
    *[
        (f"entries/position, {n}", ("entries_per_position", n), ".0f")
        for n in ("p50", "p95", "max")
    ],
    *[(f"entropy (nats), {n}", ("entropy_nats", n), ".4f") for n in ("mean", "p5", "p50", "p95")],
]
_SHARD_CELLS = [
    (("entries_per_position", "mean"), ".1f"),
    (("bytes_per_loss_token", "all"), ".1f"),
    (("kept_mass", "mean"), _MASS),
    (("entropy_nats", "mean"), ".3f"),
    (("teacher_cross_entropy",), ".3f"),
]


def _shown(facts: Mapping[str, Any], path: tuple[str, ...], digits: str) -> str:
    """Return a number; a dash for a mean over no position."""
    value: Any = facts
    for key in path:
        value = value.get(key, 0.0)
    if not digits:
        return str(value)
    if not facts["loss_tokens"]:
        return "—"
    return format_kept_mass(value) if digits == _MASS else f"{value:{digits}}"
