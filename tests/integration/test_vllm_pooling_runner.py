"""The pooling runner of vLLM's GPU model runner (V2), driven on a CPU with the capture's pooler.

The CPU build drives the pooler by another runner; on a GPU it is this one. The runner, its batches
and the pooler are the real ones; the model is a table of logits that hidden states point into, so
that columns are equal to the last bit however rows are cut.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.sampling.inclusion import InclusionRule
from pipeline.sampling.noise import row_noise, sample_key
from pipeline.teacher.sparsify.device import SparseScheme, sparsify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

VOCAB, SLOTS, STEP = 301, 6, 32
GRID = (1.0, 2.0)
SCHEMES = {
    "top-k": SparseScheme(9, GRID),
    "threshold": SparseScheme(0, GRID, InclusionRule(GRID, (1 / 9, 1 / 23.5))),
}
LENGTHS = (5, 2, 70, 3, 33, 9, 41, 2)
"""More requests than slots, and some longer than two steps."""


class Table(torch.nn.Module):
    """A model whose head looks up the row of logits that a hidden state names."""

    is_pooling_model = True

    def __init__(self, scheme: SparseScheme, *, vllm_config: Any = None, prefix: str = "") -> None:
        from pipeline.teacher.engines.vllm_pooler import CapturePooler

        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.table_RV = torch.randn((sum(LENGTHS), VOCAB), generator=draw) * 3
        self.most_rows = 0
        self.pooler = CapturePooler(self.compute_logits, scheme, head_rows=7)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return input_ids + positions

    def compute_logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        self.most_rows = max(self.most_rows, hidden_RD.shape[0])
        return self.table_RV[hidden_RD[:, 0].long()]


class Driver:
    """What the model runner does around the pooling runner: slots, batches, padding."""

    def __init__(self, scheme: SparseScheme) -> None:
        from vllm.config import PoolerConfig
        from vllm.v1.worker.gpu.input_batch import InputBuffers
        from vllm.v1.worker.gpu.pool.pooling_runner import PoolingRunner

        self.scheme, self.model = scheme, Table(scheme)
        pooler = PoolerConfig(task="token_classify", tok_pooling_type="ALL", use_activation=False)
        config = SimpleNamespace(
            pooler_config=pooler, get_pooling_task=lambda tasks: pooler.task,
            is_matryoshka=False,
        )  # fmt: skip
        vllm_config: Any = SimpleNamespace(
            model_config=config, scheduler_config=SimpleNamespace(max_num_seqs=SLOTS)
        )
        self.runner = PoolingRunner(self.model, vllm_config)
        device = torch.device("cpu")
        self.buffers = InputBuffers(SLOTS, 2 * STEP, device)
        self.states: Any = SimpleNamespace(prompt_len=SimpleNamespace(np=np.zeros(SLOTS, np.int32)))
        self.first_rows = np.concatenate([[0], np.cumsum(LENGTHS)])
        draw = np.random.default_rng(5)
        self.ids = [draw.integers(0, VOCAB, length) for length in LENGTHS]
        self.rows = [
            np.sort(draw.choice(length - 1, max(1, length * 2 // 3), replace=False))
            if length > 3
            else np.arange(length - 1)
            for length in LENGTHS
        ]

    def add(self, request: int, slot: int) -> None:
        from vllm import PoolingParams

        params = PoolingParams(
            task="token_classify", use_activation=False,
            extra_kwargs={
                "capture_rows": self.rows[request].astype(np.int32).tobytes(),
                "capture_key": f"{sample_key(str(request)):x}",
            },
        )  # fmt: skip
        self.states.prompt_len.np[slot] = LENGTHS[request]
        self.runner.add_request(str(request), slot, params, self.ids[request].tolist())

    def step(self, scheduled: list[tuple[int, int, int, int]]) -> list[torch.Tensor | None]:
        """Run (request, slot, start, count) of one batch, in that order."""
        from vllm.v1.worker.gpu.input_batch import InputBatch

        counts = np.array([count for *_, count in scheduled], np.int32)
        total = int(counts.sum())
        batch = InputBatch.make_dummy(len(scheduled), total, self.buffers)
        batch.req_ids = [str(request) for request, *_ in scheduled]
        batch.idx_mapping_np = np.array([slot for _, slot, *_ in scheduled], np.intp)
        batch.num_scheduled_tokens = counts
        batch.query_start_loc_np[1:] = np.cumsum(counts)
        batch.query_start_loc[: len(counts) + 1] = torch.from_numpy(batch.query_start_loc_np)
        ends = [start + count for _, _, start, count in scheduled]
        batch.seq_lens_cpu_upper_bound = torch.tensor(ends, dtype=torch.int32)
        pointers = [
            np.arange(start, start + count) + self.first_rows[request]
            for request, _, start, count in scheduled
        ]
        # Padded as for a graph: rows that belong to nobody, and point nowhere.
        hidden_TD = torch.full((total + 5, 2), 1e9)
        hidden_TD[:total, 0] = torch.from_numpy(np.concatenate(pointers)).float()
        outputs, finished = self.runner.pool(hidden_TD, batch, self.states)
        assert finished == [
            end == LENGTHS[request] for end, (request, *_) in zip(ends, scheduled, strict=True)
        ]
        return list(outputs)

    def expected(self, request: int) -> NDArray[np.float32]:
        rows_N = self.rows[request]
        logits_NV = self.model.table_RV[torch.from_numpy(rows_N + self.first_rows[request])]
        label_N = torch.from_numpy(self.ids[request][rows_N + 1])
        noise_N = torch.from_numpy(row_noise(sample_key(str(request)), rows_N))
        return np.asarray(sparsify(logits_NV, label_N, self.scheme, noise_N).numpy())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prefills_cut_by_steps_and_slots_used_again(scheme: str) -> None:
    """Prefills are cut at the budget, batches come in another order than requests, slots return."""
    driver = Driver(SCHEMES[scheme])
    waiting, free = list(range(len(LENGTHS))), list(range(SLOTS))
    running: dict[int, tuple[int, int]] = {}
    found: dict[int, NDArray[np.float32]] = {}
    steps = 0
    while waiting or running:
        while waiting and free:
            running[waiting[0]] = (free.pop(0), 0)
            driver.add(waiting.pop(0), running[next(reversed(running))][0])
        budget, scheduled = STEP, []
        for request, (slot, start) in reversed(running.items()):
            count = min(budget, LENGTHS[request] - start, 11)  # long ones share steps
            if count:
                scheduled.append((request, slot, start, count))
                budget -= count
        outputs = driver.step(scheduled)
        steps += 1
        for (request, slot, start, count), output in zip(scheduled, outputs, strict=True):
            if start + count < LENGTHS[request]:
                assert output is None
                running[request] = (slot, start + count)
                continue
            assert output is not None
            found[request] = output.numpy()
            driver.runner.remove_request(slot)
            del running[request]
            free.append(slot)
    assert steps > 5
    assert driver.model.most_rows == 7, "no more rows of logits at a time than asked for"
    for request in range(len(LENGTHS)):
        np.testing.assert_array_equal(found[request], driver.expected(request))


@pytest.mark.parametrize("tokens", [1, 3, SLOTS, SLOTS + 3, 2 * STEP])
def test_warm_up_reaches_the_head(tokens: int) -> None:
    """The warm-up, by which vLLM measures memory, computes logits of all rows, and keeps none."""
    driver = Driver(SCHEMES["threshold"])
    driver.runner.dummy_pooler_run(torch.zeros((tokens, 2)))
    labelled = tokens - min(tokens, SLOTS)  # all but the last token of each
    assert driver.model.most_rows == min(labelled, 7)
    assert not driver.runner.pooling_states


def test_a_request_that_was_dropped_leaves_nothing() -> None:
    """A slot whose request was aborted, or preempted in the middle, begins anew."""
    driver = Driver(SCHEMES["top-k"])
    driver.add(2, 1)
    assert driver.step([(2, 1, 0, 20)]) == [None]
    driver.runner.remove_request(1)
    driver.add(2, 1)
    assert driver.step([(2, 1, 0, 30)]) == [None]
    (columns,) = driver.step([(2, 1, 30, 40)])
    assert columns is not None
    np.testing.assert_array_equal(columns.numpy(), driver.expected(2))
