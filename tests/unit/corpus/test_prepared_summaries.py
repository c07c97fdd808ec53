"""Summaries of units, joined and taken apart again by workers that may be paused anywhere."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest

from pipeline.corpus.prepared import folder as folder_module
from pipeline.corpus.prepared.folder import SUMMARIES, PreparedFolder
from pipeline.corpus.prepared.summary import BlockSummary, UnitReport, UnitSummary
from pipeline.storage import Store

JOINED = "00000-00003.jsonl.zst"
Interrupt = Callable[[], None]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> PreparedFolder:
    """Return four units, done and folded."""
    monkeypatch.setattr(folder_module, "FOLD", 4)
    made = PreparedFolder(Store(f"memory://{uuid.uuid4().hex}"))
    for index in range(4):
        made.commit(_summary(index))
    made.fold(0)
    assert made.done() == ({0, 1, 2, 3}, [JOINED])
    return made


def _summary(index: int, content: str = "old") -> UnitSummary:
    return UnitSummary(index, UnitReport(content=content), [BlockSummary(0)])


def _contents(folder: PreparedFolder) -> dict[int, str]:
    """Return what a worker that comes now takes the units for."""
    read = [one for _, some in folder.read(folder.done()[1]) for one in some]
    found = {one.index: one.report.content for one in read}
    for index, content in found.items():
        summary = folder.summary_of(index)
        assert summary is not None
        assert summary.report.content == content
    return found


def _at_next(
    folder: PreparedFolder, method: str, act: Interrupt, patch: pytest.MonkeyPatch
) -> None:
    """Let another worker act once, just before the next call of a method of the store."""
    real, left = getattr(Store, method), [act]

    def call(store: Store, *args: object, **options: object) -> object:
        if store is folder.store and left:
            left.pop()()
        return real(store, *args, **options)

    patch.setattr(Store, method, call)


def test_a_forgotten_unit_is_not_done_and_the_others_are(folder: PreparedFolder) -> None:
    assert folder.files_of(1) == [JOINED]
    folder.forget(1)
    assert folder.done()[0] == {0, 2, 3}
    assert folder.files_of(1) == []
    assert folder.summary_of(1) is None
    folder.forget(0)
    folder.forget(0)
    assert folder.done()[0] == {2, 3}
    assert _contents(folder) == {2: "old", 3: "old"}


def test_a_unit_that_is_done_again_counts_before_the_joined_file(folder: PreparedFolder) -> None:
    folder.commit(_summary(2, "new"))
    assert folder.files_of(2) == [JOINED, "00002.json"]
    assert _contents(folder) == {0: "old", 1: "old", 2: "new", 3: "old"}
    assert list(folder.to_fold(folder.done()[1], 4)) == [0]
    folder.fold(0)
    assert folder.done()[1] == [JOINED]
    assert _contents(folder)[2] == "new"


def test_what_a_killed_fold_left_is_removed(folder: PreparedFolder) -> None:
    for index in (1, 3):
        folder.commit(_summary(index))
    assert list(folder.to_fold(folder.done()[1], 4)) == [0]
    folder.fold(0)
    assert folder.done() == ({0, 1, 2, 3}, [JOINED])


def test_two_that_forget_units_of_one_file(
    folder: PreparedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _at_next(folder, "create", lambda: folder.forget(2), monkeypatch)
    folder.forget(1)
    assert 1 not in folder.done()[0]
    assert {0, 3} <= folder.done()[0]
    folder.commit(_summary(1, "new"))
    folder.commit(_summary(2, "new"))
    assert _contents(folder) == {0: "old", 1: "new", 2: "new", 3: "old"}


def test_a_paused_forget_brings_nothing_old_back(
    folder: PreparedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtake() -> None:
        folder.forget(2)
        folder.commit(_summary(1, "new"))
        folder.commit(_summary(2, "new"))
        folder.fold(0)

    # It has read the joined file and is about to look at it once more.
    reads = iter(range(100))
    real = PreparedFolder._raw

    def raw(self: PreparedFolder, name: str) -> bytes | None:
        if next(reads) == 1:
            overtake()
        return real(self, name)

    monkeypatch.setattr(PreparedFolder, "_raw", raw)
    folder.forget(1)
    assert _contents(folder) == {0: "old", 2: "new", 3: "old"}


def test_a_paused_fold_brings_nothing_old_back_and_deletes_nothing_new(
    folder: PreparedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.forget(1)
    folder.commit(_summary(1))

    def overtake() -> None:
        folder.forget(1)
        folder.commit(_summary(1, "new"))

    for method in ("list", "write", "delete_all"):
        with monkeypatch.context() as patch:
            _at_next(folder, method, overtake, patch)
            folder.fold(0)
        if method != "delete_all":  # just before the files are deleted there is no last look
            assert _contents(folder) == {0: "old", 1: "new", 2: "old", 3: "old"}, method
        folder.forget(1)
        folder.commit(_summary(1))


def test_who_only_looks_changes_nothing(folder: PreparedFolder) -> None:
    folder.store.write(f"{SUMMARIES}/00001.json", b"cut")
    before = folder.store.read(f"{SUMMARIES}/{JOINED}")
    looking = folder.only_read()
    assert [one for _, some in looking.read(["00001.json"]) for one in some] == []
    looking.commit(_summary(1, "new"))
    assert folder.store.list(SUMMARIES) == [JOINED, "00001.json"]
    assert folder.store.read(f"{SUMMARIES}/{JOINED}") == before
    assert folder.store.read(f"{SUMMARIES}/00001.json") == b"cut"
