"""Workers write responses side by side: whose file counts, what is counted, what is joined."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from pipeline.cache.layout.names import RESPONSE_PLAN, RESPONSE_UNITS, RESPONSES, response_name
from pipeline.corpus.prepared import folder as folder_module
from pipeline.corpus.prepared.heldout import BlockSplit
from pipeline.corpus.prepared.summary import SampleTotals
from pipeline.corpus.prepared.view import PlacedBlock
from pipeline.corpus.sample import CorpusCounts, Sample
from pipeline.errors import ModelError
from pipeline.storage import Store
from pipeline.teacher.generation import run as run_module
from pipeline.teacher.generation.base import WriteRequest, Written
from pipeline.teacher.generation.identity import complete_responses
from pipeline.teacher.generation.plan import ResponsePlan, WritingTask
from pipeline.teacher.generation.run import Responses, has_responses, write_responses
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.generation.shards import ResponseShard
from pipeline.teacher.generation.units import RESPONSES_LOST, ResponseUnits
from pipeline.teacher.settings import CaptureSettings
from pipeline.teacher.writer import Writer

SHARDS, EACH = 7, 2
TOTALS = SampleTotals(EACH, 3 * EACH)
PLACED = PlacedBlock(0, 0, 0, (), BlockSplit(frozenset(), TOTALS, SampleTotals(), False, False))


class Prompts:
    """Shards of two prompts; `later` are known once this worker has waited."""

    def __init__(self, later: int = 0) -> None:
        self.known = SHARDS - later
        self.asked: list[int] = []

    def refresh(self) -> None:
        pass

    def wait(self, _: float) -> None:
        self.known = SHARDS

    def release(self) -> None:
        pass

    @property
    def is_complete(self) -> bool:
        return self.known == SHARDS

    @property
    def shards(self) -> list[ResponseShard]:
        return [ResponseShard(index, ((PLACED, 0, EACH),)) for index in range(self.known)]

    def prompts(self, shard: ResponseShard) -> list[Sample]:
        rows = range(EACH * shard.index, EACH * (shard.index + 1))
        empty = np.zeros(3, np.bool_)
        return [
            Sample(f"{row:032x}", "train", np.arange(row, row + 3, dtype=np.int32), empty, row, 0)
            for row in rows
        ]

    def projected(self) -> SampleTotals:
        return SampleTotals(SHARDS * EACH, 3 * SHARDS * EACH)

    def counts(self) -> CorpusCounts:
        total = SHARDS * EACH
        return CorpusCounts(total, total, total, 0, 3 * total, 0, 0, 0, 0, 0, 0, 0, 0)


class Generator:
    """Answers with the token of this worker; raises for the prompts that begin with `bad`."""

    def __init__(self, token: int, bad: Sequence[int]) -> None:
        self.token, self.bad = token, bad

    def write(
        self, requests: Sequence[WriteRequest], *, on_responses: Callable[[int], None] | None = None
    ) -> list[Written]:
        if any(request.prompt_ids_L[0] in self.bad for request in requests):
            raise RuntimeError("index out of range")
        if on_responses is not None:
            on_responses(len(requests))
        return [Written(np.array([self.token, 2], np.int32), None) for _ in requests]

    def close(self) -> None:
        pass


class Teacher:
    """What a task asks of the teacher here."""

    settings: Any = None
    max_length = 96

    @property
    def model(self) -> Any:
        return self

    path = "nowhere"

    @property
    def tokenizer(self) -> Any:
        return self

    def decode(self, ids: list[int], **_: bool) -> str:
        return str(ids)


@pytest.fixture
def store() -> Store:
    return Store(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def write(store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Responses]:
    """Return a worker that writes all responses with a token of its own."""

    def run(token: int = 7, later: int = 0, bad: Sequence[int] = (), **options: Any) -> Responses:
        monkeypatch.setattr(run_module, "open_generator", lambda *_, **__: Generator(token, bad))
        task, prompts = _task(later)
        return write_responses(
            task, store=store, progress_every_s=99, wait_for_more=prompts.wait, **options
        )

    return run


def _task(later: int = 0) -> tuple[WritingTask, Prompts]:
    prompts: Any = Prompts(later)
    teacher: Any = Teacher()
    generate = GenerateSettings(enabled=True, max_new_tokens=9)
    plan = ResponsePlan(generate, (2,), 42, 600, {"source": "s"})
    writer: Any = Writer(teacher, teacher)
    return WritingTask(
        teacher, writer, plan, prompts, CaptureSettings(lease_s=5), {"corpus": "c"}
    ), prompts


def _tokens(store: Store, index: int) -> int:
    task, prompts = _task()
    found = ResponseUnits(task, store).read(
        prompts.shards[index], prompts.prompts(prompts.shards[index])
    )
    return int(found.tokens[0][0])  # type: ignore[union-attr]


def _contents(responses: Responses) -> str:
    responses.source.refresh()
    return responses.source.content


@pytest.mark.parametrize("damaged", [False, True])
def test_a_file_that_another_has_just_created_stays(
    damaged: bool, store: Store, write: Callable[..., Responses], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(7)
    others = store.read(response_name(3))
    store.delete(response_name(3))
    if damaged:
        store.write(response_name(3), others[:-9])
        store.delete(f"{RESPONSE_UNITS}/summaries/00003.json")
    real = ResponseUnits.check_again

    def check_again(self: ResponseUnits, shard: ResponseShard, *rest: Any) -> None:
        real(self, shard, *rest)
        store.write(response_name(shard.index), others)  # just here, the other is faster

    monkeypatch.setattr(ResponseUnits, "check_again", check_again)
    found = write(9)
    assert store.read(response_name(3)) == others
    assert _tokens(store, 3) == 7
    monkeypatch.undo()
    assert found.counts["responses"] == SHARDS * EACH


def test_folded_units_say_the_same_and_one_is_made_again(
    store: Store, write: Callable[..., Responses], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _contents(write())
    monkeypatch.setattr(folder_module, "FOLD", 3)
    assert _contents(write()) == whole
    names = store.list(f"{RESPONSE_UNITS}/summaries")
    assert names == ["00000-00002.jsonl.zst", "00003-00005.jsonl.zst", "00006.json"]
    # Before the capture has begun, other draws may take the place of what is lost.
    store.delete(response_name(4))
    other = write(9)
    assert _contents(other) != whole
    assert (_tokens(store, 3), _tokens(store, 4)) == (7, 9)
    assert other.source.counts().samples == SHARDS * EACH
    assert store.list("_meta/leases") == []


def test_all_that_was_there_counts_as_done_before(
    write: Callable[..., Responses], caplog: pytest.LogCaptureFixture
) -> None:
    write()
    with caplog.at_level(logging.INFO):
        write(later=SHARDS)
    assert f"{SHARDS * EACH}/{SHARDS * EACH} responses (100.0 %)" in caplog.text
    assert f"{SHARDS * EACH} done before" in caplog.text


def test_damaged_files_of_prompts_known_later_are_written_again(
    store: Store, write: Callable[..., Responses]
) -> None:
    write()
    before = store.read(response_name(6))
    store.write(response_name(6), before[:-9])
    write(later=SHARDS, check_files=True)
    assert store.read(response_name(6)) == before


def test_too_many_lost_names_every_file_even_where_none_can_be_read(
    store: Store, write: Callable[..., Responses]
) -> None:
    bad = [EACH * index for index in range(SHARDS)]
    with pytest.raises(ModelError, match="7 of 14 responses could not be written, the last") as one:
        write(bad=bad)
    assert all(response_name(index) in str(one.value) for index in range(SHARDS))
    for index in range(SHARDS):
        store.write(response_name(index), b"cut")
    with pytest.raises(ModelError, match="7 of 14 responses could not be written; expected"):
        write()


def test_files_of_responses_are_looked_for_by_name(
    store: Store, write: Callable[..., Responses], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_responses(store)
    assert RESPONSES_LOST not in write().counts
    assert has_responses(store)
    store.write(f"{RESPONSES}/stray.parquet", b"")
    assert has_responses(store)
    store.delete(response_name(2))
    assert not has_responses(store)
    # Of very many the manifest's word is taken: each worker would list them at each start.
    monkeypatch.setattr(run_module, "_NAMES_UP_TO", SHARDS - 1)
    assert has_responses(store)


def test_a_plan_that_is_gone_is_written_again(
    store: Store, write: Callable[..., Responses]
) -> None:
    write()
    before = store.read(RESPONSE_PLAN)
    store.delete(RESPONSE_PLAN)
    complete_responses(store, _task()[0])
    assert store.read(RESPONSE_PLAN) == before
