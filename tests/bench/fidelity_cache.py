"""A scheme through the production path: sampler, codec, Parquet, reader, collation; and its
bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.writer import encode_shard
from pipeline.cache.layout.schema import table_to_rows
from pipeline.data.collate import Batch, collate
from pipeline.loss.targets import HeadTargets
from pipeline.sampling.noise import row_noise, sample_key
from pipeline.teacher.settings import CaptureSettings
from pipeline.teacher.sparsify.columns import to_targets
from pipeline.teacher.sparsify.device import SparseScheme, sparsify
from tests.bench.fidelity_data import Hidden

__all__ = [
    "Cached", "column_sizes", "columns_of", "head_targets", "order_size", "through_the_cache",
    "whole_table",
]  # fmt: skip

_NOT_TARGET = ("sample_id", "num_tokens", "num_loss_tokens", "input_ids", "loss_mask")
_ROWS = 256


@dataclass(frozen=True, slots=True)
class Cached:
    """Sequences as stage two reads them, and the size of their targets on disk."""

    rows: list[CachedSequence]
    bytes_per_token: float
    """Of all target columns with Parquet's own overhead, and of the vocabulary's order as it is
    shared in a shard of the default size."""
    entries: float
    """Mean entries of a supervised token."""

    def batch(self, temperature: float) -> Batch:
        """Return all sequences as one batch."""
        return collate(self.rows, temperature=temperature)


def through_the_cache(hidden: Hidden, weight_VD: Tensor, scheme: SparseScheme) -> Cached:
    """Write the teacher's targets of all sequences into one shard and read them back."""
    columns_NC = columns_of(hidden, weight_VD, scheme)
    rows, tails = [], []
    ends = np.cumsum(hidden.counts_S)
    for index, end in enumerate(ends):
        start = end - hidden.counts_S[index]
        ids_L, loss_mask_L = hidden.input_ids[index], hidden.loss_mask[index]
        targets, tail_N = to_targets(
            columns_NC[start:end],
            scheme,
            sample_id=hidden.sample_ids[index],
            label_N=ids_L[loss_mask_L],
            rows_N=np.flatnonzero(loss_mask_L) - 1,
        )
        rows.append(CachedSequence(hidden.sample_ids[index], ids_L, loss_mask_L, targets))
        tails.append(tail_N)
    spec = CodecSpec(
        len(weight_VD), scheme.rule, scheme.quantisation, largest_known=scheme.keeps_largest
    )
    record, data = encode_shard(
        rows, spec, split="train", index=0, temperatures=scheme.temperatures,
        identity_digest="0" * 64, tails=tails,
    )  # fmt: skip
    table = whole_table(data)
    shared = order_size(data) / CaptureSettings().shard_tokens
    decoded = table_to_rows(table, spec, scheme.temperatures)
    entries = sum(int(row.targets.counts_N.sum()) for row in decoded)
    size = sum(column_sizes(data).values()) / record.loss_tokens
    return Cached(decoded, size + shared, entries / record.loss_tokens)


def column_sizes(data: bytes) -> dict[str, int]:
    """Return the compressed bytes of each of a Parquet file's columns that hold targets."""
    metadata = pq.read_metadata(pa.BufferReader(data))
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            name = chunk.path_in_schema.split(".")[0]
            if name not in _NOT_TARGET:
                sizes[name] = sizes.get(name, 0) + chunk.total_compressed_size
    return sizes


def order_size(data: bytes) -> int:
    """Return the bytes that a shard's footer has of the order of the vocabulary."""
    metadata = pq.read_metadata(pa.BufferReader(data)).metadata or {}
    return len(metadata.get(b"distill_ranks", b""))


def whole_table(data: bytes) -> pa.Table:
    """Return a Parquet file, read as the reader does: by the calling thread alone."""
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)


def head_targets(batch: Batch) -> HeadTargets:
    """Return the head's targets, as the student's module builds them."""
    return HeadTargets(
        ids_NK=batch.ids_NK,
        logprobs_NK=batch.logprobs_NK,
        inclusion_NK=batch.inclusion_NK,
        log_z_N=batch.log_z_N,
        entropy_N=batch.entropy_N,
        label_N=batch.label_ids_N,
    )


def columns_of(hidden: Hidden, weight_VD: Tensor, scheme: SparseScheme) -> np.ndarray:
    """Return the engine's output: columns of every supervised row, with its noise."""
    noise, label_N = [], torch.from_numpy(hidden.label_N)
    for sample_id, loss_mask_L in zip(hidden.sample_ids, hidden.loss_mask, strict=True):
        rows_N = np.flatnonzero(loss_mask_L).astype(np.int64) - 1
        noise.append(row_noise(sample_key(sample_id), rows_N))
    noise_N = torch.from_numpy(np.concatenate(noise))
    parts = []
    for start in range(0, len(label_N), _ROWS):
        some = slice(start, start + _ROWS)
        logits_RV = torch.from_numpy(hidden.teacher_ND[some]).float() @ weight_VD.t()
        parts.append(sparsify(logits_RV, label_N[some], scheme.first_phase, noise_N[some]).numpy())
    return np.concatenate(parts)
