"""The prepared corpus: known unit by unit, the same whoever prepares it and in whatever order."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.corpus.conclusion import conclude_samples
from pipeline.corpus.intake import TeacherTokens
from pipeline.corpus.prepared import folder as folder_module
from pipeline.corpus.prepared.folder import SUMMARIES, PreparedFolder
from pipeline.corpus.prepared.units import Unit
from pipeline.corpus.prepared.view import CorpusView
from pipeline.corpus.reading import open_reading
from pipeline.corpus.sample import Sample
from pipeline.corpus.samples import Block, SampleIntake, prepare_unit
from pipeline.corpus.settings import CorpusSettings
from pipeline.errors import CorpusError
from pipeline.storage import Store
from tests.whole_corpus import build_corpus

Write = Callable[..., Path]
ROWS = [{"text": "what does it do " * (n % 5 + 1) + str(n)} for n in range(120)]


class Prepared:
    """A prepared corpus in memory, filled unit by unit."""

    def __init__(self, path: Path, tokenizer: Any, url: str, **options: Any) -> None:
        options = {"unit_mib": 0.001, "heldout_fraction": 0.1} | options
        self.settings = CorpusSettings(dataset_name=str(path), **options)
        reading = open_reading(self.settings)
        self.intake = SampleIntake(
            self.settings, tokenizer, reading, 7, TeacherTokens(), add_eos=True
        )
        self.folder = PreparedFolder(Store(url))
        self.cuts = 0
        self.units = self.folder.begin(self.intake.identity(), self._cut)

    def _cut(self) -> tuple[Unit, ...]:
        self.cuts += 1
        return self.intake.reading.units(self.settings)

    def prepare(self, unit: Unit, *, commit: bool = True) -> None:
        def write(number: int, block: Block) -> None:
            rows = block.train, block.candidates
            block.summary.checksums = self.folder.write_block(unit.index, number, rows)

        summary = prepare_unit(self.intake, unit, write=write)
        if commit:
            self.folder.commit(summary)

    def view(self) -> CorpusView:
        view = CorpusView(
            self.folder, self.units, self.intake.rule,
            lambda unit: self.prepare(unit, commit=False),
        )  # fmt: skip
        view.refresh()
        return view

    def samples(self, view: CorpusView, split: Any) -> list[Sample]:
        return [sample for block in view.blocks for sample in view.samples(block, split)]


@pytest.fixture
def prepared(tokenizer: Any, write_jsonl: Write, tmp_path: Path) -> Callable[..., Prepared]:
    path = write_jsonl(ROWS)

    def new(url: str | None = None, **options: Any) -> Prepared:
        return Prepared(path, tokenizer, url or str(tmp_path / "prepared"), **options)

    return new


def _same(one: Sample, two: Sample) -> bool:
    return (
        (one.sample_id, one.split, one.source_index, one.part)
        == (two.sample_id, two.split, two.source_index, two.part)
        and one.input_ids.tobytes() == two.input_ids.tobytes()
        and one.loss_mask.tobytes() == two.loss_mask.tobytes()
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 999),
    fraction=st.sampled_from([0.0, 1e-9, 0.03, 0.3]),
    at_most=st.sampled_from([None, 2, 9]),
    overlong=st.sampled_from(["truncate", "split"]),
)
def test_the_order_of_the_work_changes_nothing(
    seed: int,
    fraction: float,
    at_most: int | None,
    overlong: str,
    prepared: Callable[..., Prepared],
    tokenizer: Any,
) -> None:
    options: dict[str, Any] = {
        "heldout_fraction": fraction, "heldout_samples": at_most, "overlong": overlong,
        "max_length": 30,
    }  # fmt: skip
    made = prepared(f"memory://{seed}-{fraction}-{at_most}-{overlong}", **options)
    assert len(made.units) > 4
    whole = build_corpus(made.settings, tokenizer=tokenizer, seed=7)
    draw, view = random.Random(seed), made.view()
    known: list[Any] = []
    for unit in draw.sample(made.units, len(made.units)):
        made.prepare(unit)
        view.refresh()
        # What is decided is never taken back.
        assert view.blocks[: len(known)] == known
        known = list(view.blocks)
    assert view.is_complete
    counts = conclude_samples(view.summary(), made.intake)
    assert counts == whole.counts
    assert view.report.content == whole.content
    for split in ("train", "heldout"):
        found, wanted = made.samples(view, split), list(whole.samples.of_split(split))
        assert len(found) == len(wanted)
        assert all(map(_same, found, wanted))


def test_known_as_soon_as_all_before_it_is(prepared: Callable[..., Prepared]) -> None:
    made = prepared(heldout_fraction=0.3)
    view = made.view()
    made.prepare(made.units[1])
    assert not view.refresh()
    assert not view.blocks
    made.prepare(made.units[0])
    assert view.refresh()
    assert [block.unit for block in view.blocks] == [0, 1]
    assert 0 < view.known_share < 1


def test_a_row_that_a_small_corpus_may_hold_out_is_not_decided(
    prepared: Callable[..., Prepared],
) -> None:
    made = prepared(heldout_fraction=1e-9)
    view = made.view()
    for unit in made.units[:-1]:
        made.prepare(unit)
        view.refresh()
    assert not view.blocks, "any row so far may be one of the four smallest hashes"
    made.prepare(made.units[-1])
    view.refresh()
    assert view.heldout.samples == view.moved_rows == 4


def test_the_first_who_comes_cuts(prepared: Callable[..., Prepared]) -> None:
    one, two = prepared(), prepared()
    assert (one.cuts, two.cuts) == (1, 0)
    assert one.units == two.units
    with pytest.raises(CorpusError, match=r"other settings .*max_length: 4096 there, 77 asked"):
        prepared(max_length=77)


def test_damaged_files_are_prepared_again(prepared: Callable[..., Prepared]) -> None:
    made = prepared()
    for unit in made.units:
        made.prepare(unit)
    store = made.folder.store
    before = {name: store.read(f"tokens/{name}") for name in store.list("tokens")}
    store.write("tokens/00002-0.parquet", b"no Parquet")
    store.delete("tokens/00003-0.parquet")
    store.write(f"{SUMMARIES}/00004.json", b'{"index": 4}')
    view = made.view()
    assert view.num_done == 4, "a damaged summary is removed, its unit is done again"
    made.prepare(made.units[4])
    view.refresh()
    assert view.is_complete
    assert len(made.samples(view, "train")) == view.train.samples
    assert {name: store.read(f"tokens/{name}") for name in store.list("tokens")} == before


def test_a_source_that_changed_is_said(
    prepared: Callable[..., Prepared], write_jsonl: Write
) -> None:
    made = prepared()
    for unit in made.units:
        made.prepare(unit)
    made.folder.store.delete("tokens/00001-0.parquet")
    write_jsonl([{"text": row["text"].replace("what", "that")} for row in ROWS])
    with pytest.raises(CorpusError, match=r"00001-0.parquet: damaged .*, and preparing"):
        made.samples(made.view(), "train")


def test_folded_summaries_say_the_same(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "FOLD", 3)
    made = prepared()
    for unit in made.units:
        made.prepare(unit)
    before = made.view()
    _, names = made.folder.done()
    firsts = list(made.folder.to_fold(names, len(made.units)))
    assert firsts == list(range(0, len(made.units) - 2, 3))
    for first in firsts:
        made.folder.fold(first)
    done, names = made.folder.done()
    assert done == set(range(len(made.units)))
    assert len(names) == len(firsts) + len(made.units) % 3
    after = made.view()
    assert after.blocks == before.blocks
    assert after.summary() == before.summary()
    assert not before.refresh(), "a view that knew them takes none twice"


def test_a_unit_that_cannot_be_divided_is_written_in_blocks(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    from pipeline.corpus import reading, samples

    monkeypatch.setattr(samples, "_BLOCK_TOKENS", 100)
    monkeypatch.setattr(reading, "_BATCH_ROWS", 4)
    made = prepared(unit_mib=100, heldout_fraction=0.3)
    assert len(made.units) == 1
    made.prepare(made.units[0])
    view = made.view()
    assert len(view.blocks) > 5
    whole = build_corpus(made.settings, tokenizer=tokenizer, seed=7)
    found = made.samples(view, "train") + made.samples(view, "heldout")
    wanted = [sample for split in ("train", "heldout") for sample in whole.samples.of_split(split)]
    assert all(map(_same, found, wanted))
    assert len(found) == len(wanted)
