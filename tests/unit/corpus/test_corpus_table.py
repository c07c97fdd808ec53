"""Samples on the scratch disk: the same as a list, at constant memory, gone with the process."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus import table as table_module
from pipeline.corpus.sample import Sample
from pipeline.corpus.table import SampleTable
from pipeline.errors import ResourceError
from pipeline.storage.scratch import ScratchFile
from pipeline.teacher.capture.source import TableShards

Build = Callable[..., Any]


def _sample(number: int, length: int, *, heldout: bool) -> Sample:
    draw = np.random.default_rng(number)
    return Sample(
        sample_id=draw.bytes(16).hex(),
        split="heldout" if heldout else "train",
        input_ids=draw.integers(0, 1 << 31, length).astype(np.int32),
        loss_mask=draw.random(length) < 0.5,
        source_index=number * 3_000_000_000,
        part=number % 3,
    )


def _same(a: Sample, b: Sample) -> bool:
    assert a.input_ids.dtype == np.int32
    assert a.loss_mask.dtype == np.bool_
    return (
        (a.sample_id, a.split, a.source_index, a.part)
        == (b.sample_id, b.split, b.source_index, b.part)
        and a.input_ids.tolist() == b.input_ids.tolist()
        and a.loss_mask.tolist() == b.loss_mask.tolist()
    )


def _check(table: SampleTable, wanted: list[Sample]) -> None:
    assert len(table) == len(wanted)
    assert all(map(_same, table, wanted))
    assert list(table.sample_ids()) == [s.sample_id for s in wanted]
    lengths = [int(n) for block in table.lengths() for n in block]
    assert lengths == [len(s.input_ids) for s in wanted]
    assert table.num_tokens == sum(lengths)


@given(
    samples=st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=60),
    cut=st.slices(60),
    again=st.slices(60),
    block=st.integers(1, 9),
    spread=st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_a_table_is_the_list_that_was_written(
    samples: list[tuple[int, bool]], cut: slice, again: slice, block: int, spread: int
) -> None:
    wanted = [_sample(i, n, heldout=h) for i, (n, h) in enumerate(samples)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_module, "_BLOCK", block)
        patch.setattr(table_module, "_SPREAD", spread)
        table = SampleTable.of(wanted)
        _check(table, wanted)
        _check(table[cut][again], wanted[cut][again])
        for split in ("train", "heldout"):
            own = [sample for sample in wanted if sample.split == split]
            _check(table.of_split(split), own)
            _check(table.of_split(split)[cut], own[cut])
        for place in (0, -1, len(wanted) // 2):
            if wanted:
                assert _same(table[place], wanted[place])
        for outside in (len(wanted), -len(wanted) - 1):
            with pytest.raises(IndexError):
                table[outside]


def test_views_are_equal_by_place_and_cost_nothing() -> None:
    table = SampleTable.of([_sample(i, 5, heldout=i % 3 == 0) for i in range(9)])
    assert table.of_split("train")[1:4] == table.of_split("train")[1:4]
    assert table.of_split("train")[1:4] != table.of_split("heldout")[1:4]
    assert table[:3] != table[:4]
    assert not table[4:4]
    with pytest.raises(StopIteration):
        table.of_split("test")


def test_a_sample_can_be_written_to_like_one_in_memory() -> None:
    """torch warns of arrays that cannot."""
    table = SampleTable.of([_sample(1, 9, heldout=False)])
    first = table[0]
    first.input_ids[0] = 7
    first.loss_mask[0] = True
    assert _same(table[0], _sample(1, 9, heldout=False))


def test_many_threads_read_at_once() -> None:
    wanted = [_sample(i, 30, heldout=i % 7 == 0) for i in range(500)]
    table = SampleTable.of(wanted)

    def read(start: int) -> bool:
        return all(map(_same, table[start:], wanted[start:]))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(0, 480, 24)))


def _held(build: Build, path: Path) -> tuple[int, int]:
    """Return the bytes that a corpus and its plan hold, and their peak."""
    gc.collect()
    tracemalloc.start()
    corpus = build(path, heldout_fraction=0.1, unit_mib=0.02)
    shards = TableShards(corpus, 50_000).shards
    assert sum(len(shard.samples) for shard in shards) == corpus.counts.samples
    gc.collect()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held, peak


def test_memory_does_not_grow_with_the_corpus(build: Build, write_jsonl: Build) -> None:
    few, many = 1_500, 5_500
    rows = [{"text": f"row {i} " + "what does it do " * (i % 7 + 1)} for i in range(many)]
    small, large = (write_jsonl(rows[:n], f"{n}.jsonl") for n in (few, many))
    _held(build, small)  # what is loaded once
    small_held, small_peak = _held(build, small)
    large_held, large_peak = _held(build, large)
    # A Sample in a list takes over 500 bytes; here 4,000 more of them take no more than a few
    # shards of the plan do; the peak may differ by what four files hold back before they write.
    assert large_held - small_held < 10 * (many - few)
    assert large_peak - small_peak < 4 << 18


def test_the_bytes_lie_in_tmpdir_without_a_name(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, numpy as np\n"
        "from pipeline.corpus.sample import Sample\n"
        "from pipeline.corpus.table import SampleTable\n"
        "ids = np.zeros(10**6, np.int32)\n"
        "table = SampleTable.of([Sample('0' * 32, 'train', ids, ids == 0, 0, 0)])\n"
        "folder, names = os.environ['TMPDIR'], []\n"
        "for number in range(3, 64):\n"
        "    try: names.append(os.readlink(f'/proc/self/fd/{number}'))\n"
        "    except OSError: pass\n"
        "print(sum(name.startswith(folder) for name in names), os.listdir(folder))\n"
        "sys.stdout.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.split() == ["4", "[]"]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel's own full disk: every write fails with ENOSPC.
    full = Path("/dev/full").open("r+b", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
    with full, pytest.raises(ResourceError) as caught:
        SampleTable.of([_sample(i, 50, heldout=False) for i in range(5)])
    said = str(caught.value)
    assert said.startswith("the scratch disk is full: 0.0 MB of tokenised samples are in ")
    assert "set TMPDIR to a folder on a larger disk" in said
    assert caught.value.exit_code == 4


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ResourceError, match=r"cannot be kept there .No usable temporary"):
        ScratchFile("samples")


def test_what_was_never_written_is_not_made_up() -> None:
    file = ScratchFile("samples")
    assert [file.append(b"abc"), file.append(b"de"), file.size] == [0, 3, 5]
    file.flush()
    target = np.zeros(4, np.uint8)
    file.read_into(target, 1)
    assert target.tobytes() == b"bcde"
    with pytest.raises(ResourceError, match="ends at byte 5"):
        file.read_into(target, 2)
