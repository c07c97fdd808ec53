"""Prompts to requests to samples, and the files that hold responses on their way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.cache.layout.quarantine import QuarantinedRow
from pipeline.corpus.prompts import Prompt, Prompts
from pipeline.corpus.sample import CorpusCounts
from pipeline.corpus.split import prompt_id
from pipeline.teacher.generation.base import Written
from pipeline.teacher.generation.files import ResponseText, decode_responses, encode_responses
from pipeline.teacher.generation.plan import ResponsePlan
from pipeline.teacher.generation.settings import GenerateSettings


def _plan(lengths: list[int], **chosen: Any) -> ResponsePlan:
    prompts = [
        Prompt(
            prompt_id("s", str(n)),
            "heldout" if n % 3 == 2 else "train",
            np.arange(5, 5 + length, dtype=np.int32),
            n,
        )
        for n, length in enumerate(lengths)
    ]
    heldout = sum(prompt.split == "heldout" for prompt in prompts)
    counts = CorpusCounts(
        len(lengths), len(lengths), len(lengths) - heldout, heldout, sum(lengths), 0, 0, 0, 0, 0,
        0, 0, 0,
    )  # fmt: skip
    chosen = {"enabled": True, "max_new_tokens": 9, **chosen}
    return ResponsePlan(
        Prompts(prompts, counts, 2, {"source": "s"}), GenerateSettings(**chosen), (2,), 42, 600
    )


def _responses(plan: ResponsePlan, seed: int = 0) -> list[NDArray[np.int32]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 50, draw.integers(1, 10)).astype(np.int32) for _ in range(plan.total)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 12))
def test_shards_hold_every_prompt_once_and_requests_do_not_know_the_cut(
    lengths: list[int], responses: int, size: int
) -> None:
    plan = _plan(lengths, responses=responses, shard_prompts=size)
    shards = plan.shards()
    assert [shard.index for shard in shards] == list(range(-(-len(lengths) // size)))
    assert [p for shard in shards for p in shard.prompts] == plan.prompts.prompts
    cut = [request for shard in shards for request in plan.requests(shard.prompts)]
    whole = _plan(lengths, responses=responses, shard_prompts=1000).requests(plan.prompts.prompts)
    assert [(r.response_id, r.seed) for r in cut] == [(r.response_id, r.seed) for r in whole]
    assert len({r.response_id for r in cut}) == len({r.seed for r in cut}) == plan.total
    # More responses later, other prompts beside: those there keep their seeds.
    more = _plan([*lengths, 3], responses=responses + 1).requests(plan.prompts.prompts)
    assert {(r.response_id, r.seed) for r in cut} <= {(r.response_id, r.seed) for r in more}


def test_samples_are_prompt_and_response_and_the_response_counts() -> None:
    plan = _plan([3, 1, 4], responses=2)
    written = _responses(plan)
    corpus = plan.corpus(written)
    requests = plan.requests(plan.prompts.prompts)
    for sample, request, ids in zip(corpus.samples, requests, written, strict=True):
        prompt = request.prompt_ids_L
        assert sample.sample_id == request.response_id
        assert sample.input_ids.tolist() == [*prompt, *ids]
        assert sample.input_ids.dtype == np.int32
        assert sample.loss_mask.tolist() == [False] * len(prompt) + [True] * len(ids)
    assert [s.split for s in corpus.samples] == ["train"] * 4 + ["heldout"] * 2
    assert [s.part for s in corpus.samples] == [0, 1] * 3
    assert (corpus.counts.samples, corpus.counts.train, corpus.counts.heldout) == (6, 4, 2)
    tokens = sum(map(len, written))
    assert (corpus.counts.tokens, corpus.counts.loss_tokens) == (tokens + 16, tokens)


def test_the_identity_knows_every_token() -> None:
    plan = _plan([3, 1, 4])
    written = _responses(plan)
    whole = plan.corpus(written).identity
    assert whole["generate"]["end_tokens"] == [2]
    assert whole["responses"]["count"] == 3
    unfinished = sum(int(ids[-1]) != 2 for ids in written)
    assert whole["responses"]["unfinished"] == unfinished
    for n in range(3):
        changed = [ids.copy() for ids in written]
        changed[n][-1] ^= 1
        assert plan.corpus(changed).identity["responses"] != whole["responses"]
    # The same tokens, parted otherwise between two responses.
    moved = [np.r_[written[0], written[1][:1]], written[1][1:], written[2]]
    assert len(moved[1])
    assert plan.corpus(moved).identity["responses"]["blake2b"] != whole["responses"]["blake2b"]
    json.dumps(whole)


def test_the_upper_bound_has_the_sizes() -> None:
    plan = _plan([3, 1, 4] * 40, responses=2, max_new_tokens=5)
    bound, full = plan.upper_bound(), plan.corpus([np.full(5, 7, np.int32)] * plan.total)
    assert bound.counts == full.counts
    assert [s.input_ids.size for s in bound.samples] == [s.input_ids.size for s in full.samples]
    assert [s.sample_id for s in bound.samples] == [s.sample_id for s in full.samples]
    assert plan.most_tokens == plan.total * 5 == bound.counts.loss_tokens
    for sample, other in zip(bound.samples[:64], full.samples, strict=False):
        assert sample.loss_mask.tolist() == other.loss_mask.tolist()
    assert "responses" not in bound.identity


def _file(*, logprobs: bool = True, digest: str = "d") -> tuple[bytes, list[NDArray[np.int32]]]:
    ids = [np.array(part, np.int32) for part in ([5], [7, 8, 2], list(range(300)))]
    written = [Written(i, -np.ones(i.size, np.float32) if logprobs else None) for i in ids]
    texts = [
        ResponseText(f"r{n}", "train", "Grüße?", "\ufffd\x00 …", bool(n)) for n in range(len(ids))
    ]
    return encode_responses(texts, written, identity_digest=digest), ids


@pytest.mark.parametrize("logprobs", [True, False])
def test_a_file_comes_back(logprobs: bool, tmp_path: Path) -> None:
    data, ids = _file(logprobs=logprobs)
    assert data == _file(logprobs=logprobs)[0]
    found = decode_responses(data, response_ids=["r0", "r1", "r2"], identity_digest="d")
    assert found is not None
    assert [part.tolist() for part in found.tokens] == [part.tolist() for part in ids]
    assert found.quarantined == ()
    import pyarrow.parquet as pq

    (tmp_path / "a.parquet").write_bytes(data)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column("prompt")[0].as_py() == "Grüße?"
    assert ("logprobs" in table.column_names) == logprobs


def test_a_response_that_is_lacking_says_why() -> None:
    lost = QuarantinedRow("r1", "RuntimeError: index out of range", 3)
    ids = np.array([5, 2], np.int32)
    written = [Written(ids, None), lost, Written(ids[:1], None)]
    texts = [ResponseText(f"r{n}", "train", "?", "!", finished=True) for n in range(3)]
    data = encode_responses(texts, written, identity_digest="d")
    found = decode_responses(data, response_ids=["r0", "r1", "r2"], identity_digest="d")
    assert found is not None
    assert [part.tolist() for part in found.tokens] == [[5, 2], [], [5]]
    assert found.quarantined == (lost,)


def test_a_prompt_without_a_response_is_no_sample() -> None:
    plan = _plan([3, 1, 4], responses=2)
    ids = np.array([7, 2], np.int32)
    whole, less = plan.corpus([ids] * 6), plan.corpus([ids] * 4 + [ids[:0], ids])
    assert less.counts.samples == 5 == len(less.samples)
    assert less.counts.train + less.counts.heldout == 5
    assert less.counts.loss_tokens == 10 == whole.counts.loss_tokens - 2
    assert less.counts.tokens == whole.counts.tokens - 6
    names = [sample.sample_id for sample in whole.samples]
    assert [sample.sample_id for sample in less.samples] == [*names[:4], names[5]]
    assert less.identity["responses"] != whole.identity["responses"]


def test_a_file_of_others_is_not_taken() -> None:
    data, _ = _file()
    assert decode_responses(data, response_ids=["r0", "r1", "r2"], identity_digest="e") is None
    assert decode_responses(data, response_ids=["r0", "r2", "r1"], identity_digest="d") is None
    assert decode_responses(data, response_ids=["r0", "r1"], identity_digest="d") is None
    assert decode_responses(b"", response_ids=[], identity_digest="d") is None
    assert decode_responses(data[:-9], response_ids=["r0"], identity_digest="d") is None


def test_every_flipped_byte_is_found() -> None:
    data, _ = _file()
    for place in range(len(data)):
        spoiled = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        found = decode_responses(spoiled, response_ids=["r0", "r1", "r2"], identity_digest="d")
        assert found is None, place
