"""A cache as a torch dataset: the batches of the trainer, each row once an epoch, resumed."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.api.dataset import TargetBatch, TargetDataset
from pipeline.cache.io.reader import open_cache
from pipeline.data.settings import DataSettings
from pipeline.data.stream.train_stream import TrainStream
from pipeline.errors import ConfigError
from tests.stage_runner import ROOT

CACHE = str(ROOT / "tests/golden/cache-v1-top-k")


def _same(a: TargetBatch, b: TargetBatch) -> bool:
    return torch.equal(a["inputs"]["input_ids"], b["inputs"]["input_ids"]) and torch.equal(
        a["targets"].entries.logprobs_NK, b["targets"].entries.logprobs_NK
    )


def _rows(batches: list[TargetBatch]) -> list[tuple[int, ...]]:
    """Return the token ids of every sequence, sorted."""
    rows = []
    for batch in batches:
        starts = (batch["inputs"]["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        ids = batch["inputs"]["input_ids"][0].tolist()
        rows += [tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return sorted(rows)


def _every(split: str) -> list[tuple[int, ...]]:
    return sorted(tuple(row.input_ids_L.tolist()) for row in open_cache(CACHE).rows(split))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_an_epoch_holds_every_row_once(split: str) -> None:
    dataset = TargetDataset(CACHE, split)
    batches = list(DataLoader(dataset, batch_size=None))
    assert len(batches) == len(dataset)
    assert _rows(batches) == _every(split)


def test_ranks_share_an_epoch() -> None:
    parts = [list(TargetDataset(CACHE, rank=rank, world_size=2)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    full = [batch for part in parts for batch in part if len(batch["targets"])]
    assert _rows(full) == _every("train")


def test_batches_are_the_trainers() -> None:
    dataset = TargetDataset(CACHE, temperature=2.0, seed=7)
    cache = open_cache(CACHE)
    stream = TrainStream(
        cache.source("train"), DataSettings(), seed=7, packs_per_step=1, rank=0, world_size=1,
        accumulation=1, pack_length=dataset.tokens,
        temperature=2.0,
    )  # fmt: skip
    for step, batch in zip(stream.steps(0, len(dataset)), dataset, strict=True):
        (wanted,) = step.micro_batches
        assert torch.equal(wanted.input_ids_1T, batch["inputs"]["input_ids"])
        assert torch.equal(wanted.log_z_N, batch["targets"].entries.log_z_N)
        assert torch.equal(wanted.label_index_N, batch["targets"].index_N)


def test_labels_are_the_supervised_tokens() -> None:
    for batch in TargetDataset(CACHE):
        labels, targets = batch["labels"][0], batch["targets"]
        places = (labels != -100).nonzero()[:, 0]
        assert torch.equal(places - 1, targets.index_N)
        assert torch.equal(labels[places], targets.entries.label_N)
        assert torch.equal(labels[places], batch["inputs"]["input_ids"][0, places])


def test_an_epoch_is_another_order_and_can_be_chosen() -> None:
    dataset = TargetDataset(CACHE, tokens=8)
    first, second = list(dataset), list(dataset)
    assert _rows(first) == _rows(second)
    assert not all(_same(a, b) for a, b in zip(first, second, strict=False))
    dataset.set_epoch(0)
    assert all(_same(a, b) for a, b in zip(first, dataset, strict=True))


@pytest.mark.parametrize("done", [1, 2])
def test_it_goes_on_where_its_state_was_taken(done: int) -> None:
    dataset = TargetDataset(CACHE, tokens=8)
    whole = [*dataset, *dataset]
    stopped = TargetDataset(CACHE, tokens=8)
    read = list(islice(iter(stopped), done))
    resumed = TargetDataset(CACHE, tokens=8)
    resumed.load_state_dict(stopped.state_dict())
    read += [*resumed, *resumed]
    assert len(read) == len(whole)
    assert all(_same(a, b) for a, b in zip(read, whole, strict=True))


def test_fewer_entries() -> None:
    batch = next(iter(TargetDataset(CACHE, top_k=3)))
    assert batch["targets"].entries.ids_NK.shape[1] == 3


def test_moved_to_a_device() -> None:
    targets = next(iter(TargetDataset(CACHE)))["targets"].to("meta")
    assert targets.index_N.is_meta
    assert all(part.is_meta for part in targets.entries if part is not None)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"split": "trian"}, ConfigError, "split 'trian'; expected train or heldout"),
        ({"temperature": 3.0}, ConfigError, "temperature 3 is not in the cache"),
        ({"rank": 0}, ConfigError, "rank 0 and world_size None"),
        ({"rank": 2, "world_size": 2}, ConfigError, "rank 2; expected 0 to 1 of 2"),
        ({"tokens": 2}, ConfigError, "data.pack_length"),
    ],
)
def test_mistakes_are_said(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        TargetDataset(CACHE, **options)


def test_several_workers_are_rejected() -> None:
    loader = DataLoader(TargetDataset(CACHE), batch_size=None, num_workers=2)
    with pytest.raises(ConfigError, match="2 workers"):
        next(iter(loader))
