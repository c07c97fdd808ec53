"""Export a cache as plain Parquet lists with tokenizer and card, for trainers without its codec."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache.codec.targets import CachedSequence, SparseTargets
from pipeline.cache.io.reader import Cache
from pipeline.cache.layout.card import carried_licence
from pipeline.cache.layout.names import CARD, MANIFEST, PLAN, SPLITS
from pipeline.cache.tools.derive import check_apart
from pipeline.cache.tools.export_card import export_card, rounding_left
from pipeline.errors import CacheError
from pipeline.sampling.quantisation import rounding_log_bias
from pipeline.storage import Store

__all__ = ["export_plain"]

_INTS, _REALS = pa.list_(pa.int32()), pa.list_(pa.float32())
_PLAIN = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("input_ids", _INTS),
        pa.field("loss_mask", pa.list_(pa.bool_())),
        pa.field("positions", _INTS),
        pa.field("target_ids", pa.list_(_INTS)),
        pa.field("target_logprobs", pa.list_(_REALS)),
        pa.field("tail_mass", _REALS),
        pa.field("log_z", pa.list_(_REALS)),
        pa.field("entropy", pa.list_(_REALS)),
        pa.field("label_logprob", _REALS),
    ]
)
_PLAIN_SAMPLED = _PLAIN.append(pa.field("target_inclusion", pa.list_(_REALS)))
"""For sampled targets: without inclusion probabilities the entries would give biased targets."""
_WRITTEN = pa.field("written_logprob", _REALS)
"""Where the cache holds what the writer of the text recorded."""
_REQUESTED = pa.field("target_requested", pa.list_(pa.list_(pa.bool_())))
"""Where the cache holds requested entries: which of the entries are there for that alone."""


def export_plain(
    cache: Cache,
    target: Store,
    *,
    command: str,
    top_k: int | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> int:
    """Write all that another trainer needs as plain lists; return the rows.

    Every shard of both splits becomes `data/<split>/<index>.parquet`; `tokenizer/` holds the
    teacher's tokenizer, and README.md says what the columns are and how to train from them; it is
    written last. Lists of targets have one item for each supervised token, in order. Log-probs are
    float32 at temperature 1, of sampled entries less the known bias of their rounding: exp(log p) /
    inclusion is then an unbiased target at temperature 1. `distill_export` in a file's metadata has
    the temperatures, and what is left of that bias at each. Existing shards are kept, so a killed
    export can be continued; `_EXPORT` names the cache that is exported.

    Args:
        cache: what to export.
        target: the folder to write to; not within the cache.
        command: for the card.
        top_k: only the largest entries of each position, this many; None for all.
        on_rows: called with the number of rows written.

    Raises:
        CacheError: the target is the cache's own folder, within it or around it, or holds a cache,
            another export or other data; a shard is damaged; `top_k` of sampled targets.
    """
    check_apart(target, [cache.store])
    # Held-out rows that are sampled beside a top-k become a top-k too: splits have equal columns.
    held = None
    if cache.rule is None and cache.heldout_rule is not None:
        held = cache.manifest.identity["scheme"].get("top_k", cache.manifest.codec["vocab_size"])
    sources = {
        split: cache.source(split, top_k=top_k or (held if split == "heldout" else None))
        for split in SPLITS
    }
    tokenizer = cache.tokenizer_files()
    _reserve_target(cache, target, top_k)
    for name, data in tokenizer.items():
        target.write(f"tokenizer/{name}", data)
    schema = _PLAIN if cache.rule is None else _PLAIN_SAMPLED
    if cache.spec.written_logprobs:
        schema = schema.append(_WRITTEN)
    if cache.spec.requested_entries:
        schema = schema.append(_REQUESTED)
    schema = schema.with_metadata({_METADATA: json.dumps(_facts(cache))})
    rows_done = 0
    for source in sources.values():
        for shard, count in enumerate(source.shard_rows()):
            path = source.shards[shard].path
            if not target.exists(path):
                sink = pa.BufferOutputStream()
                with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
                    for start in range(0, count, _BATCH_ROWS):
                        rows = source.read_rows(
                            shard, range(start, min(count, start + _BATCH_ROWS))
                        )
                        writer.write_table(_table(rows, schema))
                target.write(path, sink.getvalue().to_pybytes())
            rows_done += count
            if on_rows is not None:
                on_rows(count)
    try:
        own_card: bytes | None = cache.store.read(CARD)
    except FileNotFoundError:
        own_card = None
    text = export_card(
        cache.manifest, cache.spec, command=command, top_k=top_k, licence=carried_licence(own_card)
    )
    target.write(CARD, text.encode())
    return rows_done


_MARK = "_EXPORT"
_METADATA = "distill_export"
_VERSION = 3
"""Of the columns: an export that was begun with others is not continued."""
_BATCH_ROWS = 256
"""Lists are several times larger than encoded rows; this many rows are converted at a time."""


def _reserve_target(cache: Cache, target: Store, top_k: int | None) -> None:
    """Reject a folder with other content: its files would be taken for exported shards."""
    wanted = {
        "identity_digest": cache.manifest.identity_digest,
        "top_k": top_k,
        "version": _VERSION,
    }
    if target.exists(MANIFEST) or target.exists(PLAN):
        raise CacheError(f"{target.url}: holds a cache", expected="another folder")
    if not target.exists(_MARK):
        data = [f"data/{split}/{name}" for split in SPLITS for name in target.list(f"data/{split}")]
        if data or target.exists(CARD):
            raise CacheError(
                f"{target.url}: holds {data[0] if data else CARD}, which no export has written",
                expected="an empty folder, or one that this command has begun",
            )
    if not target.create(_MARK, json.dumps(wanted).encode()):
        try:
            found = json.loads(target.read(_MARK))
        except ValueError:
            found = None
        if found != wanted:
            raise CacheError(
                f"{target.url}: holds an export of another cache or with another --top-k",
                expected="an empty folder, or one that this command has begun",
            )


def _facts(cache: Cache) -> dict[str, object]:
    """Return what a program needs beside the columns, for each file's metadata."""
    return {
        "version": _VERSION,
        "identity_digest": cache.manifest.identity_digest,
        "temperatures": list(cache.manifest.temperatures),
        "vocab_size": cache.spec.vocab_size,
        "rounding": rounding_left(cache.spec, cache.manifest.temperatures),
    }


def _table(rows: Sequence[CachedSequence], schema: pa.Schema) -> pa.Table:
    targets = [row.targets for row in rows]
    columns: dict[str, list[object]] = {
        "sample_id": [row.sample_id for row in rows],
        "input_ids": [row.input_ids_L for row in rows],
        "loss_mask": [row.loss_mask_L for row in rows],
        "positions": [np.flatnonzero(row.loss_mask_L) for row in rows],
        "target_ids": [list(_by_position(t, t.token_ids_E)) for t in targets],
        "target_logprobs": [list(_by_position(t, _logprobs(t))) for t in targets],
        "tail_mass": [_tail_mass(t) for t in targets],
        "log_z": [list(t.log_z_NG) for t in targets],
        "entropy": [list(t.entropy_NG) for t in targets],
        "label_logprob": [t.label_logprob_N for t in targets],
    }
    if "target_inclusion" in schema.names:
        columns["target_inclusion"] = [list(_by_position(t, _inclusion(t))) for t in targets]
    if _WRITTEN.name in schema.names:
        columns[_WRITTEN.name] = [t.written_logprob_N for t in targets]
    if _REQUESTED.name in schema.names:
        columns[_REQUESTED.name] = [list(_by_position(t, _requested(t))) for t in targets]
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _inclusion(targets: SparseTargets) -> NDArray[np.float32]:
    assert targets.inclusion_E is not None
    return targets.inclusion_E


def _requested(targets: SparseTargets) -> NDArray[np.bool_]:
    assert targets.requested_E is not None
    return targets.requested_E


def _logprobs(targets: SparseTargets) -> NDArray[np.float32]:
    """Return log p at temperature 1; for sampled entries less the known bias of rounding."""
    logprobs_E = targets.logprobs_E
    if targets.inclusion_E is not None and targets.sampled_step:
        bias = np.float32(rounding_log_bias(targets.sampled_step, 1.0))
        logprobs_E = np.where(targets.inclusion_E < 1, logprobs_E - bias, logprobs_E)
    return logprobs_E


def _tail_mass(targets: SparseTargets) -> NDArray[np.float64]:
    """Return 1 less the mass of each position's always-kept entries at temperature 1."""
    mass_E = np.exp(targets.logprobs_E, dtype=np.float64)
    if targets.inclusion_E is not None:
        mass_E = mass_E * (targets.inclusion_E >= 1)
    owner_E = np.repeat(np.arange(targets.num_positions), targets.counts_N)
    kept_N = np.bincount(owner_E, mass_E, minlength=targets.num_positions)
    tail_N: NDArray[np.float64] = np.clip(1.0 - kept_N, 0.0, 1.0)
    return tail_N


def _by_position(
    targets: SparseTargets, values_E: NDArray[np.generic]
) -> Iterator[NDArray[np.generic]]:
    """Yield the values of each supervised token."""
    ends = np.cumsum(targets.counts_N)
    for start, end in zip(ends - targets.counts_N, ends, strict=True):
        yield values_E[start:end]
