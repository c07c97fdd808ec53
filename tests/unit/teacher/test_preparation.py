"""Workers prepare a corpus together: each unit once, the same bytes whoever does it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.corpus.intake import TeacherTokens
from pipeline.corpus.prepared import folder as folder_module
from pipeline.corpus.settings import CorpusSettings
from pipeline.errors import CorpusError, ResourceError
from pipeline.observe.shares import Shares
from pipeline.storage import Store
from pipeline.teacher.capture.groups import Grouping, GroupReader
from pipeline.teacher.fleet.leases import LeaseBoard
from pipeline.teacher.preparation import processes as processes_module
from pipeline.teacher.preparation import work as work_module
from pipeline.teacher.preparation.corpus import CorpusWork, corpus_work
from pipeline.teacher.preparation.processes import default_processes
from tests.stage_runner import ROOT, fork_context
from tests.tiny import make_tokenizer, write_corpus

ROWS = 150


@pytest.fixture(autouse=True)
def _forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork processes from a server that has imported everything, but in one test, as in use."""
    if request.node.name != "test_what_stops_a_unit_stops_the_run[2]":
        monkeypatch.setattr(processes_module, "get_context", lambda _: fork_context())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(write_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"text": "what does it do " * (n % 5 + 1) + str(n)} for n in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def work(tokenizer: Any, data: Path, tmp_path: Path) -> Callable[..., CorpusWork]:
    def new(name: str = "cache", **options: Any) -> CorpusWork:
        options = {"unit_mib": 0.001, "heldout_fraction": 0.1, "processes": 1} | options
        return corpus_work(
            CorpusSettings(dataset_name=str(data), **options),
            tokenizer=tokenizer,
            seed=7,
            teacher=TeacherTokens(),
            cache_url=str(tmp_path / name),
        )

    return new


def _run(work: CorpusWork, shares: Shares | None = None) -> None:
    with work.preparing(lease_s=5, shares=shares or Shares()) as preparation:
        preparation.wait()


def _files(store: Store) -> dict[str, bytes]:
    folders = ("", "tokens", "summaries", "leases")
    names = [f"{folder}/{n}" if folder else n for folder in folders for n in store.list(folder)]
    return {name: store.read(name) for name in names}


def test_one_and_many_prepare_the_same(work: Callable[..., CorpusWork]) -> None:
    one, many = work("one"), [work("many", processes=k) for k in (1, 2, 1)]
    _run(one)
    shares = [Shares() for _ in many]
    threads = [threading.Thread(target=_run, args=pair) for pair in zip(many, shares, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = _files(many[0].folder.store)
    assert made == _files(one.folder.store)
    assert not any(name.startswith("leases") for name in made)
    counts = [share.summary().counts for share in shares]
    assert sum(count.get("units", 0) for count in counts) == len(one.units()) > 6
    one.view.refresh()
    tokens = one.view.train.tokens + one.view.heldout.tokens
    assert sum(count.get("tokenised", 0) for count in counts) == tokens


def test_a_prepared_corpus_is_opened_and_nothing_is_done(work: Callable[..., CorpusWork]) -> None:
    _run(work())
    shares = Shares()
    again = work()
    _run(again, shares)
    assert not shares.summary().counts
    again.view.refresh()
    assert again.view.is_complete


def test_several_caches_share_an_address(work: Callable[..., CorpusWork], tmp_path: Path) -> None:
    where = str(tmp_path / "shared")
    one, two = work("a", prepared=where), work("b", prepared=where)
    _run(one)
    shares = Shares()
    _run(two, shares)
    assert not shares.summary().counts
    # Another corpus at the same address has a folder of its own.
    other = work("c", prepared=where, max_length=99)
    _run(other)
    assert len(list((tmp_path / "shared").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_what_stops_a_unit_stops_the_run(
    processes: int, work: Callable[..., CorpusWork], data: Path
) -> None:
    data.write_text(data.read_text() + "{broken\n")
    bad = work(processes=processes, on_bad_row="refuse")
    with pytest.raises(CorpusError, match=r"data\.jsonl, byte \d+: Expecting property name"):
        _run(bad)


def test_what_a_process_committed_unheard_is_accounted_for(
    work: Callable[..., CorpusWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heartbeat after the last look at the folder brings no lease back."""
    real = processes_module.UnitProcesses.submit

    def late(self: Any, *args: Any, **options: Any) -> Any:
        future = real(self, *args, **options)
        future.result()
        return future

    monkeypatch.setattr(processes_module.UnitProcesses, "submit", late)
    made, shares = work(processes=99), Shares()
    _run(made, shares)
    assert shares.summary().counts["units"] == len(made.units())
    assert not made.folder.store.list("leases")


def test_a_killed_process_is_said(
    work: Callable[..., CorpusWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes_module, "_work", _die)
    with pytest.raises(ResourceError, match=r"was killed.*corpus\.processes"):
        _run(work(processes=2))


def test_a_damaged_summary_is_waited_for_and_prepared_again(
    work: Callable[..., CorpusWork],
) -> None:
    made = work()
    _run(made)
    store = made.folder.store
    before = _files(store)
    store.write("summaries/00003.json", b'{"index": 3}')
    again = work()
    with again.preparing(lease_s=5, shares=Shares()) as preparation:
        preparation.wait_until(lambda: bool(again.view.refresh() and again.view.is_complete))
    assert _files(store) == before


def test_threads_repair_damaged_files_side_by_side(work: Callable[..., CorpusWork]) -> None:
    made = work()
    _run(made)
    store = made.folder.store
    before = _files(store)
    store.delete_all([f"tokens/{name}" for name in store.list("tokens")])
    made.view.refresh()
    grouping = Grouping("train", 1 << 40)
    for block in made.view.blocks:
        grouping.add(block)
    grouping.close()
    samples = GroupReader(made.view).samples(grouping.groups[0])
    assert len(samples) == made.view.train.samples
    assert _files(store) == before


def test_what_killed_workers_left_is_removed_and_foreign_files_are_not(
    work: Callable[..., CorpusWork],
) -> None:
    made = work()
    _run(made)
    store = made.folder.store
    store.write("leases/unit-00001.0.json", b"{}")
    store.write("summaries/.DS_Store", b"x")
    Path(store.path("tokens/00001-0.parquet.1234.partial")).write_bytes(b"half")
    _run(work())
    assert store.list("leases") == []
    assert not list(Path(store.root).rglob("*.partial"))
    assert store.read("summaries/.DS_Store") == b"x"


def test_an_estimate_of_a_corpus_that_may_be_small_goes_on_until_it_knows(
    work: Callable[..., CorpusWork],
) -> None:
    view = work(heldout_fraction=1e-9).sampled()
    assert view.is_complete
    assert view.train.samples == ROWS - 4


PARENT = """
import pickle, sys, time
from pipeline.teacher.preparation.processes import UnitProcesses
if __name__ == "__main__":
    recipe, units = pickle.load(open(sys.argv[1], "rb"))
    pool = UnitProcesses(recipe, 2)
    for unit in units[:2]:
        UnitProcesses.result(pool.submit(unit, is_last=False))
    print(*[p.pid for p in pool._pool._processes.values()], flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_processes_end_with_a_parent_that_is_killed(
    work: Callable[..., CorpusWork], tmp_path: Path
) -> None:
    made = work()
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "recipe").write_bytes(pickle.dumps((made.recipe, made.units())))
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", tmp_path / "recipe"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert children
    assert made.folder.done()[0] == {0, 1}, "each commits what it has prepared"
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < end
        time.sleep(0.05)


def _die(*_: Any) -> None:
    os._exit(9)


def test_summaries_are_folded_on_the_way(
    work: Callable[..., CorpusWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "FOLD", 3)
    made = work()
    _run(made)
    names = made.folder.store.list("summaries")
    assert "00000-00002.jsonl.zst" in names
    assert len(names) < len(made.units())
    made.view.refresh()
    assert made.view.is_complete


def test_a_fold_whose_worker_died_is_taken_over(
    work: Callable[..., CorpusWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = work()
    _run(made)
    folder = made.folder
    before = dict(folder.read(folder.done()[1]))
    monkeypatch.setattr(folder_module, "FOLD", 3)
    now = 0.0

    def board(name: str) -> LeaseBoard:
        return LeaseBoard(
            folder.store, name, 10.0, lambda: now, is_dead=lambda owner: False, folder="leases"
        )

    assert board("dead").try_lease("fold-00000-00002", None)
    units = tuple(map(work_module.UnitWork, made.units()))
    pool = work_module._UnitPool(folder, units, board("living"))
    folded = "00000-00002.jsonl.zst"
    assert pool.missing() == []
    assert folded not in folder.done()[1], "its owner may be alive"
    assert "00003-00005.jsonl.zst" in folder.done()[1], "what nobody has is folded"
    now = 10.0
    assert pool.missing() == []
    ((_, summaries),) = folder.read([folded])
    assert summaries == [s for index in range(3) for s in before[f"{index:05d}.json"]]
    assert folder.store.list("leases") == []


def test_a_unit_is_forgotten_while_nobody_folds(
    work: Callable[..., CorpusWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = work()
    _run(made)
    folder = made.folder
    monkeypatch.setattr(folder_module, "FOLD", 3)
    boards = [LeaseBoard(folder.store, name, 0.3, folder="leases") for name in "ab"]
    lease = boards[0].try_lease("fold-00000-00002", None)
    assert lease is not None
    with boards[0].beating():
        thread = threading.Thread(
            target=work_module.forget_unit, args=(folder, 1, boards[1]), daemon=True
        )
        thread.start()
        thread.join(0.8)
        assert 1 in folder.done()[0], "another worker may be folding"
        boards[0].done(lease)
        thread.join(10)
    assert 1 not in folder.done()[0]
    assert folder.store.list("leases") == []


@pytest.mark.parametrize(
    ("options", "is_removed"),
    [({"unit_mib": 1}, True), ({}, False), ({"unit_mib": 1, "prepared": "shared"}, False)],
)
def test_a_small_corpus_beside_its_cache_leaves_nothing_behind(
    options: dict[str, Any], is_removed: bool, work: Callable[..., CorpusWork], tmp_path: Path
) -> None:
    if "prepared" in options:
        options = options | {"prepared": str(tmp_path / "shared")}
    made = work(**options)
    _run(made)
    before = _files(made.folder.store)
    made.discard()
    assert _files(made.folder.store) == ({} if is_removed else before)
    assert (tmp_path / "cache").exists() == (not is_removed and "prepared" not in options)
    work(**options).discard()  # of what is not there, or stays


def test_an_estimate_writes_nothing(work: Callable[..., CorpusWork]) -> None:
    made = work(heldout_fraction=0.3)
    view = made.sampled()
    assert view.num_done == 2
    assert 0 < view.known_share < 1
    assert not _files(made.folder.store)
    _run(made)
    assert work(heldout_fraction=0.3).sampled().is_complete


@pytest.mark.parametrize(
    ("gpus", "units", "quota", "wanted"),
    [
        (0, 99, "max 100000", 8),
        (4, 99, "max 100000", 2),
        (64, 9, "max 100000", 1),
        (0, 3, "max 100000", 3),
        (0, 99, "300000 100000", 3),
        (1, 99, "50000 100000", 1),
        (0, 99, "", 8),
    ],
)
def test_processes_by_default(
    gpus: int, units: int, quota: str, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    for number in range(gpus):
        (tmp_path / f"nvidia{number}").touch()
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "cpu.max").write_text(quota)
    assert default_processes(units, devices=tmp_path, cgroup=tmp_path) == wanted
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(192)))
    assert default_processes(999, devices=tmp_path / "none", cgroup=tmp_path / "none") == 32
