"""Layouts of sparse targets on the same teacher outputs: bytes, encoding and decoding rate.

`make bench-codec`. The targets are the embedded teacher's: a top-64 in the peers' layouts
and in ours, and the project's default sampled targets. Every layout is a Parquet file with only the
targets' columns (zstd, without the text's ids), written and read as its authors do, by one thread,
with numpy. Times are CPU seconds of this
process, the best of several; the ratios are against Axolotl's layout in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from pipeline.cache.codec.spec import CodecSpec
from pipeline.cache.codec.targets import CachedSequence
from pipeline.cache.io.writer import encode_shard
from pipeline.cache.layout.schema import table_to_rows
from pipeline.teacher.sparsify.columns import to_targets
from pipeline.teacher.sparsify.device import SparseScheme
from tests.bench.codec_tried import tried
from tests.bench.fidelity import sampled
from tests.bench.fidelity_cache import column_sizes, columns_of, order_size, whole_table
from tests.bench.fidelity_data import Hidden, hidden_states

_TRIES = 15
TOP_K = 64
T1, T2 = sampled(1 / 28), sampled(1 / 9, 1 / 23.5)
TOP = SparseScheme(TOP_K, (1.0, 2.0))


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the table, per supervised token."""

    name: str
    size: float
    encode: float
    """Tokens per CPU second."""
    decode: float


def _rows(
    hidden: Hidden, weight_VD: torch.Tensor, scheme: SparseScheme
) -> tuple[list[CachedSequence], list[NDArray[np.float32]]]:
    columns_NC = columns_of(hidden, weight_VD, scheme)
    rows, tails, start = [], [], 0
    for index, count in enumerate(hidden.counts_S):
        ids_L, loss_mask_L = hidden.input_ids[index], hidden.loss_mask[index]
        targets, tail_N = to_targets(
            columns_NC[start : start + count], scheme, sample_id=hidden.sample_ids[index],
            label_N=ids_L[loss_mask_L], rows_N=np.flatnonzero(loss_mask_L) - 1,
        )  # fmt: skip
        rows.append(CachedSequence(hidden.sample_ids[index], ids_L, loss_mask_L, targets))
        tails.append(tail_N)
        start += count
    return rows, tails


def _best(action: Callable[[], Any]) -> float:
    """Return the minimal CPU seconds of a call, without the first, which compiles."""
    action()
    times = []
    for _ in range(_TRIES):
        begin = time.process_time()
        action()
        times.append(time.process_time() - begin)
    return min(times)


def _size(data: bytes) -> int:
    """Return the compressed bytes of the targets' columns and of their part of the footer."""
    return sum(column_sizes(data).values()) + order_size(data)


def ours(
    name: str, rows: list[CachedSequence], tails: list[NDArray[np.float32]], spec: CodecSpec
) -> Measured:
    """Measure the format through its own writer and reader."""
    grid = rows[0].targets.temperatures

    def encode() -> bytes:
        return encode_shard(
            rows, spec, split="train", index=0, temperatures=grid, identity_digest="0" * 64,
            tails=tails,
        )[1]  # fmt: skip

    data = encode()
    tokens = sum(row.targets.num_positions for row in rows)
    decode = _best(lambda: table_to_rows(whole_table(data), spec, grid))
    return Measured(name, _size(data) / tokens, tokens / _best(encode), tokens / decode)


def _written(columns: dict[str, pa.Array], level: int, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(columns), sink, compression="zstd", compression_level=level,
        use_dictionary=False, **options,
    )  # fmt: skip
    return bytes(sink.getvalue().to_pybytes())


def layout(
    name: str,
    tokens: int,
    encode: Callable[[], bytes],
    decode: Callable[[pa.Table], Any],
) -> Measured:
    """Measure another project's layout: Arrow arrays from [N, K] arrays, and back."""
    data = encode()
    seconds = _best(lambda: decode(whole_table(data)))
    return Measured(name, _size(data) / tokens, tokens / _best(encode), tokens / seconds)


def layouts(rows: list[CachedSequence]) -> list[Measured]:
    """Measure the layouts of the reference table and of the peers on a fixed top-k."""
    ids = np.concatenate([row.targets.token_ids_E for row in rows]).reshape(-1, TOP_K)
    logprobs = np.concatenate([row.targets.logprobs_E for row in rows]).reshape(-1, TOP_K)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    tokens = len(ids)
    by_id = np.argsort(ids, axis=1)

    def fixed(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind), TOP_K)

    def lists(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
        starts = pa.array(np.arange(0, values.size + 1, TOP_K), pa.int32())
        return pa.ListArray.from_arrays(starts, pa.array(values.reshape(-1), kind))

    def blobs(values: NDArray[Any]) -> pa.Array:
        size = values.dtype.itemsize * TOP_K
        buffer = pa.py_buffer(np.ascontiguousarray(values).tobytes())
        return pa.Array.from_buffers(pa.binary(size), len(values), [None, buffer])

    def back(table: pa.Table, *names: str) -> list[NDArray[Any]]:
        """Return lists as [N, K] arrays."""
        return [
            table.column(n).combine_chunks().flatten().to_numpy().reshape(-1, TOP_K)
            for n in names
        ]  # fmt: skip

    def from_blobs(table: pa.Table, name: str, dtype: Any) -> NDArray[Any]:
        array = table.column(name).combine_chunks()
        return np.frombuffer(array.buffers()[1], dtype).reshape(-1, TOP_K)

    grid = np.clip(np.rint(-logprobs * 12), 0, 255).astype(np.uint8)
    sorted_ids, sorted_grid = np.take_along_axis(ids, by_id, 1), np.take_along_axis(grid, by_id, 1)
    found = [
        layout(
            "Axolotl: list<int64>, list<float32>, zstd 3", tokens,
            lambda: _written({"i": lists(ids, pa.int64()), "v": lists(logprobs, pa.float32())}, 3),
            lambda table: back(table, "i", "v"),
        ),
        layout(
            "list<int32>, list<float32>, zstd 3", tokens,
            lambda: _written({"i": lists(ids, pa.int32()), "v": lists(logprobs, pa.float32())}, 3),
            lambda table: back(table, "i", "v"),
        ),
        layout(
            "verl: int32, float16, fixed lists, zstd 3", tokens,
            lambda: _written(
                {"i": fixed(ids, pa.int32()),
                 "v": fixed(logprobs.astype(np.float16), pa.float16())}, 3
            ),
            lambda table: back(table, "i", "v"),
        ),
        layout(
            "uint16, float16, fixed lists, BYTE_STREAM_SPLIT", tokens,
            lambda: _written(
                {"i": fixed(ids.astype(np.uint16), pa.uint16()),
                 "v": fixed(logprobs.astype(np.float16), pa.float16())},
                3, column_encoding={"v.list.element": "BYTE_STREAM_SPLIT"},
            ),
            lambda table: back(table, "i", "v"),
        ),
        layout(
            "ids sorted, DELTA_BINARY_PACKED, uint8 values", tokens,
            lambda: _written(
                {"i": fixed(sorted_ids.astype(np.int32), pa.int32()), "v": blobs(sorted_grid)},
                3, column_encoding={"i.list.element": "DELTA_BINARY_PACKED"},
            ),
            lambda table: (*back(table, "i"), from_blobs(table, "v", np.uint8) / -12.0),
        ),
        layout(
            "fixed binary: uint16 ids, uint8 values, zstd 3", tokens,
            lambda: _written({"i": blobs(ids.astype(np.uint16)), "v": blobs(grid)}, 3),
            lambda table: (from_blobs(table, "i", np.uint16), from_blobs(table, "v", np.uint8)),
        ),
    ]  # fmt: skip
    return found


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument(
        "--tried", action="store_true", help="only the codings of ids that were tried"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    hidden = hidden_states(arguments.tokens, model=arguments.model)
    weight_VD = torch.from_numpy(hidden.weight_VD)
    vocab = len(hidden.weight_VD)
    one = _rows(hidden, weight_VD, T1)
    if arguments.tried:
        print(
            f"{len(hidden.label_N)} supervised tokens, V = {vocab}, sampled for T = 1; bytes each"
        )
        for name, size in tried(*one, CodecSpec(vocab, T1.rule, T1.quantisation)):
            print(f"{name:<66} {size:6.2f}")
        return
    top = _rows(hidden, weight_VD, TOP)
    lines = [
        *layouts(top[0]),
        ours("ranked, k = 64", *top, CodecSpec(vocab, quantisation=TOP.quantisation)),
        ours(
            "ranked, sampled for T = 1, tau 1/28", *one, CodecSpec(vocab, T1.rule, T1.quantisation)
        ),
        ours(
            "ranked, sampled for T = 1 and 2",
            *_rows(hidden, weight_VD, T2),
            CodecSpec(vocab, T2.rule, T2.quantisation),
        ),
    ]
    base, sampled, swept = lines[0], *lines[-2:]
    print(f"{len(hidden.label_N)} supervised tokens of {len(hidden.sample_ids)} rows, V = {vocab}")
    print(f"{'layout':<48} {'bytes':>7} {'ratio':>6} {'encode/s':>9} {'ratio':>6} "
          f"{'decode/s':>9} {'ratio':>6}")  # fmt: skip
    for line in lines:
        print(
            f"{line.name:<48} {line.size:7.1f} {line.size / base.size:6.2f} {line.encode:9.0f} "
            f"{line.encode / base.encode:6.2f} {line.decode:9.0f} {line.decode / base.decode:6.2f}"
        )
    print(f"FIGURE codec_bytes_per_token {sampled.size:.2f}")
    print(f"FIGURE encode_tokens_per_s {sampled.encode:.0f}")
    print(f"FIGURE decode_tokens_per_s {sampled.decode:.0f}")
    print(f"FIGURE encode_tokens_per_s_t1_and_t2 {swept.encode:.0f}")
    print(f"FIGURE decode_tokens_per_s_t1_and_t2 {swept.decode:.0f}")


if __name__ == "__main__":
    main()
