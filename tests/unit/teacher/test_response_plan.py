"""Prompts to shards and requests, responses to samples, and the files that hold them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.corpus.prepared.blocks import decode_block, encode_block
from pipeline.corpus.prepared.heldout import BlockSplit, Splitting
from pipeline.corpus.prepared.summary import SampleTotals, UnitReport
from pipeline.corpus.prepared.view import PlacedBlock
from pipeline.corpus.sample import Sample
from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.split import DecidedSplit, prompt_id
from pipeline.errors import CacheError
from pipeline.teacher.generation.base import Written
from pipeline.teacher.generation.files import (
    ReadResponses,
    ResponseText,
    decode_responses,
    encode_responses,
    prompts_digest,
)
from pipeline.teacher.generation.plan import ResponsePlan
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.generation.shards import PromptShards, ResponseShard
from pipeline.teacher.generation.units import RESPONSES_LOST, response_unit


def _plan(**chosen: Any) -> ResponsePlan:
    chosen = {"enabled": True, "max_new_tokens": 9, **chosen}
    return ResponsePlan(GenerateSettings(**chosen), (2,), 42, 600, {"source": "s"})


def _prompts(lengths: list[int]) -> list[Sample]:
    return [
        Sample(
            prompt_id("s", str(n)),
            "heldout" if n % 3 == 2 else "train",
            np.arange(5, 5 + length, dtype=np.int32),
            np.zeros(length, np.bool_),
            n,
            0,
        )
        for n, length in enumerate(lengths)
    ]


def _responses(total: int, seed: int = 0) -> list[NDArray[np.int32]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 50, draw.integers(1, 10)).astype(np.int32) for _ in range(total)]


def _written(ids: list[NDArray[np.int32]]) -> list[Written]:
    return [Written(ids_N, None) for ids_N in ids]


class View:
    """A corpus of blocks of prompts, of which more and more are known."""

    def __init__(self, sizes: list[int]) -> None:
        self.prompts = _prompts([3] * sum(sizes))
        ends = list(itertools.accumulate(sizes))
        self._parts = [self.prompts[e - n : e] for n, e in zip(sizes, ends, strict=True)]
        self._all = [self._block(number) for number in range(len(sizes))]
        self.known = 0
        self.report = UnitReport()

    def _block(self, number: int) -> PlacedBlock:
        held = sum(prompt.split == "heldout" for prompt in self._parts[number])
        sums = [SampleTotals(n, 3 * n) for n in (len(self._parts[number]) - held, held)]
        return PlacedBlock(number, 0, 0, (), BlockSplit(frozenset(), *sums, False, False))

    def refresh(self) -> bool:
        return True

    @property
    def blocks(self) -> list[PlacedBlock]:
        return self._all[: self.known]

    @property
    def is_complete(self) -> bool:
        return self.known == len(self._all)

    def summary(self) -> Any:
        return None

    def samples(self, block: PlacedBlock, split: str) -> list[Sample]:
        return [prompt for prompt in self._parts[block.unit] if prompt.split == split]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 12))
def test_shards_hold_every_prompt_once_and_requests_do_not_know_the_cut(
    sizes: list[int], responses: int, size: int
) -> None:
    view, plan = View(sizes), _plan(responses=responses, shard_prompts=size)
    settings: Any = SimpleNamespace(settings=CorpusSettings())
    source = PromptShards(lambda: view, settings, size)  # type: ignore[arg-type,return-value]
    source._conclude = lambda _: SimpleNamespace()  # type: ignore[assignment,return-value]
    known: list[ResponseShard] = []
    for number in range(len(sizes) + 1):
        view.known = number
        source.refresh()
        # What is cut stays when more of the corpus is known.
        assert list(source.shards[: len(known)]) == known
        known = list(source.shards)
    assert [shard.index for shard in known] == list(range(-(-sum(sizes) // size)))
    assert all(shard.num_prompts == size for shard in known[:-1])
    assert [p for shard in known for p in source.prompts(shard)] == view.prompts
    assert list(source.first_prompts()) == view.prompts
    cut = [request for shard in known for request in plan.requests(source.prompts(shard))]
    whole = _plan(responses=responses, shard_prompts=1000).requests(view.prompts)
    assert [(r.response_id, r.seed) for r in cut] == [(r.response_id, r.seed) for r in whole]
    total = sum(sizes) * responses
    assert len({r.response_id for r in cut}) == len({r.seed for r in cut}) == total
    # More responses later: those there keep their seeds.
    more = _plan(responses=responses + 1).requests(view.prompts)
    assert {(r.response_id, r.seed) for r in cut} <= {(r.response_id, r.seed) for r in more}


def test_samples_are_prompt_and_response_and_the_response_counts() -> None:
    plan, prompts = _plan(responses=2), _prompts([3, 1, 4])
    written = _responses(6)
    block, summary = response_unit(7, prompts, _written(written), plan)
    rows = sorted([*block.train, *block.candidates], key=lambda row: (row.row, row.part))
    for row, request, ids in zip(rows, plan.requests(prompts), written, strict=True):
        prompt = request.prompt_ids_L
        assert row.sample_id == request.response_id
        assert row.input_ids.tolist() == [*prompt, *ids]
        assert row.input_ids.dtype == np.int32
        assert row.loss_mask.tolist() == [False] * len(prompt) + [True] * len(ids)
    assert [(row.row, row.part) for row in rows] == [(n, k) for n in range(3) for k in range(2)]
    assert [row.row for row in block.candidates] == [2, 2], "the split is the prompts'"
    assert summary.index == 7
    split = Splitting(DecidedSplit()).add(block.summary)
    assert split.heldout == {2}
    assert (split.num_train.samples, split.num_heldout.samples) == (4, 2)
    assert not split.moves
    assert not split.releases
    tokens = sum(map(len, written))
    assert split.num_train.tokens + split.num_heldout.tokens == tokens + 16
    assert split.num_train.loss_tokens + split.num_heldout.loss_tokens == tokens
    assert summary.report.turns == 6
    assert summary.report.unended == sum(int(ids[-1]) != 2 for ids in written)


def test_the_content_knows_every_token() -> None:
    plan, prompts = _plan(), _prompts([3, 1, 4])
    written = _responses(3)

    def content(responses: list[NDArray[np.int32]], asked: list[Sample] = prompts) -> str:
        return response_unit(0, asked, _written(responses), plan)[1].report.content

    for n in range(3):
        changed = [ids.copy() for ids in written]
        changed[n][-1] ^= 1
        assert content(changed) != content(written)
    # The same tokens, parted otherwise between two responses, and another prompt.
    moved = [np.r_[written[0], written[1][:1]], written[1][1:], written[2]]
    assert len(moved[1])
    assert content(moved) != content(written)
    assert content(written, _prompts([3, 2, 4])) != content(written)
    assert plan.identity()["generate"]["end_tokens"] == [2]
    json.dumps(plan.identity())


def test_the_upper_bound_has_the_sizes() -> None:
    plan, prompts = _plan(responses=2, max_new_tokens=5), _prompts([3, 1, 4])
    bound = plan.upper_bound(SampleTotals(3, 8))
    block, _ = response_unit(0, prompts, _written([np.full(5, 7, np.int32)] * 6), plan)
    split = Splitting(DecidedSplit()).add(block.summary)
    split.num_train.add(split.num_heldout)
    assert bound == split.num_train == SampleTotals(6, 46, 30)


def _file(*, logprobs: bool = True, digest: str = "d") -> tuple[bytes, list[NDArray[np.int32]]]:
    ids = [np.array(part, np.int32) for part in ([5], [7, 8, 2], list(range(300)))]
    written = [Written(i, -np.ones(i.size, np.float32) if logprobs else None) for i in ids]
    texts = [
        ResponseText(f"r{n}", "train", "Grüße?", "\ufffd\x00 …", bool(n)) for n in range(len(ids))
    ]
    return encode_responses(texts, written, identity_digest=digest, prompts="p"), ids


def _decode(
    data: bytes, names: str = "r0 r1 r2", digest: str = "d", prompts: str = "p"
) -> ReadResponses | None:
    return decode_responses(
        data, where="here", response_ids=names.split(), identity_digest=digest, prompts=prompts
    )


@pytest.mark.parametrize("logprobs", [True, False])
def test_a_file_comes_back(logprobs: bool, tmp_path: Path) -> None:
    data, ids = _file(logprobs=logprobs)
    assert data == _file(logprobs=logprobs)[0]
    found = _decode(data)
    assert found is not None
    assert [one.token_ids_N.tolist() for one in found.written] == [part.tolist() for part in ids]
    assert found.quarantined == ()
    import pyarrow.parquet as pq

    (tmp_path / "a.parquet").write_bytes(data)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column("prompt")[0].as_py() == "Grüße?"
    assert ("logprobs" in table.column_names) == logprobs


@pytest.mark.parametrize(("logprobs", "top"), [(True, 0), (False, 3), (True, 3)])
def test_what_the_writer_recorded_comes_back_from_file_and_unit(logprobs: bool, top: int) -> None:
    draw, plan, prompts = np.random.default_rng(0), _plan(), _prompts([3, 1, 4])
    written = [
        Written(
            ids_N,
            -draw.random(len(ids_N), np.float32) if logprobs else None,
            draw.integers(0, 50, (len(ids_N), top)).astype(np.int32) if top else None,
        )
        for ids_N in _responses(3)
    ]
    texts = [ResponseText(f"r{n}", "train", "?", "!", finished=True) for n in range(3)]
    found = _decode(encode_responses(texts, written, identity_digest="d", prompts="p"))
    assert found is not None
    block, summary = response_unit(0, prompts, found.written, plan)
    data = encode_block(block.train)
    # Made again from the file: the same bytes.
    again, same = response_unit(0, prompts, found.written, plan)
    assert encode_block(again.train) == data
    assert summary.report.content == same.report.content
    rows = decode_block(data)
    assert rows[0].sample("train", 0).written is rows[0].written
    for row, one in zip(rows, written, strict=False):
        assert row.written is not None
        np.testing.assert_equal(row.written.logprobs_N, one.logprobs_N)
        np.testing.assert_equal(row.written.top_ids_NK, one.top_ids_NK)
    plain = [Written(one.token_ids_N, None) for one in written]
    without, other = response_unit(0, prompts, plain, plan)
    assert other.report.content != summary.report.content
    assert decode_block(encode_block(without.train))[0].written is None


def test_a_response_that_is_lacking_says_why() -> None:
    lost = QuarantinedRow("r1", "RuntimeError: index out of range", 3)
    ids = np.array([5, 2], np.int32)
    written = [Written(ids, None), lost, Written(ids[:1], None)]
    texts = [ResponseText(f"r{n}", "train", "?", "!", finished=True) for n in range(3)]
    found = _decode(encode_responses(texts, written, identity_digest="d", prompts="p"))
    assert found is not None
    assert [one.token_ids_N.tolist() for one in found.written] == [[5, 2], [], [5]]
    assert found.quarantined == (lost,)


def test_a_prompt_without_a_response_is_no_sample() -> None:
    plan, prompts = _plan(responses=2), _prompts([3, 1, 4])
    ids = np.array([7, 2], np.int32)
    whole, all_of_it = response_unit(0, prompts, _written([ids] * 6), plan)
    less, summary = response_unit(0, prompts, _written([ids] * 4 + [ids[:0], ids]), plan)
    assert [row.sample_id for row in less.train] == [row.sample_id for row in whole.train]
    assert [row.part for row in less.candidates] == [1]
    assert summary.report.counts == {RESPONSES_LOST: 1}
    assert summary.report.turns == 5
    assert summary.report.content != all_of_it.report.content
    # Nor is there a row where both are lost.
    none, _ = response_unit(0, prompts, _written([ids] * 4 + [ids[:0]] * 2), plan)
    assert none.summary.rows == 2
    assert not none.summary.candidates


def test_a_file_of_others_is_not_taken() -> None:
    data, _ = _file()
    with pytest.raises(CacheError, match=r"here: intact, but of another cache; .* --cache_dir"):
        _decode(data, digest="e")
    for other in ({"names": "r0 r2 r1"}, {"names": "r0 r1"}, {"prompts": "q"}):
        with pytest.raises(CacheError, match="here: answers other prompts than those of the corp"):
            _decode(data, **other)
    assert _decode(b"", names="") is None
    assert _decode(data[:-9], names="r0") is None


def test_an_edited_prompt_is_another_prompt() -> None:
    prompts, edited = _prompts([3, 1, 4]), _prompts([3, 2, 4])
    assert [one.sample_id for one in prompts] == [one.sample_id for one in edited]
    assert prompts_digest(prompts) == prompts_digest(_prompts([3, 1, 4]))
    assert prompts_digest(prompts) != prompts_digest(edited)


def test_every_flipped_byte_is_found() -> None:
    data, _ = _file()
    for place in range(len(data)):
        spoiled = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        assert _decode(spoiled) is None, place
