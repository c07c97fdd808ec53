"""The capture inside vLLM: a pooling head that reduces logits to columns on the device.

vLLM's extension points used here: `ModelRegistry.register_model`, a model class with
`is_pooling_model` and a `pooler` for the task `token_classify`, and `PoolingParams.extra_kwargs`.
Worker processes find the class through the entry point `vllm.general_plugins` (pyproject.toml),
which calls `register`; what to register comes through the environment, which workers inherit.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.pooler.common import PoolingParamsUpdate
from vllm.v1.pool.metadata import PoolingMetadata

from pipeline.sampling.noise import row_noise
from pipeline.teacher.engines.vllm_variable import CAPTURE_PREFIX, read_variable
from pipeline.teacher.sparsify.device import SparseScheme, sparsify

__all__ = ["CapturePooler", "register_capture"]

# The task's name in vLLM for "one output per token"; nothing is classified.
_TASK = "token_classify"


class CapturePooler(Pooler):
    """Computes the sparse columns of the wanted rows of every scheduled chunk."""

    def __init__(
        self,
        compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
        scheme: SparseScheme,
        head_rows: int,
    ) -> None:
        """Keep the model's own head; `head_rows` bounds the logits that exist at one time."""
        super().__init__()
        self._compute_logits = compute_logits
        self._scheme = scheme
        self._head_rows = head_rows

    def get_supported_tasks(self) -> Set[Any]:
        """Serve one vector per token."""
        return {_TASK}

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        """Ask for the prompt's ids: the label token of a row is the next one."""
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(
        self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata
    ) -> list[torch.Tensor | None]:
        """Return float32 [N, C] for each finished request, None for the others."""
        cursor = pooling_metadata.get_pooling_cursor()
        scheduled = cursor.num_scheduled_tokens_cpu.tolist()
        ends = cursor.seq_lens_cpu.tolist()
        prompts = pooling_metadata.get_prompt_token_ids_cpu()
        rows: list[torch.Tensor] = []
        label: list[torch.Tensor] = []
        noise: list[torch.Tensor] = []
        counts: list[int] = []
        offset = 0
        for index, count in enumerate(scheduled):
            start = ends[index] - count
            params = pooling_metadata.pooling_params[index]
            wanted = _wanted_rows(params, prompts[index].numel())
            inside = wanted[(wanted >= start) & (wanted < ends[index])]
            rows.append(inside - start + offset)
            label.append(prompts[index][inside + 1].to(torch.int64))
            noise.append(_noise(params, inside))
            counts.append(int(inside.numel()))
            offset += count
        columns_RC = self._columns(
            hidden_states, torch.cat(rows), torch.cat(label), torch.cat(noise)
        )
        outputs: list[torch.Tensor | None] = []
        finished = cursor.get_finished_mask()
        for state, part, done in zip(
            pooling_metadata.pooling_states, torch.split(columns_RC, counts), finished, strict=True
        ):
            state.hidden_states_cache.append(part)  # vLLM's own place for parts of a prefill
            outputs.append(torch.cat(state.hidden_states_cache) if done else None)
            if done:
                state.clean()
        return outputs

    def _columns(
        self,
        hidden_TD: torch.Tensor,
        rows_R: torch.Tensor,
        label_R: torch.Tensor,
        noise_R: torch.Tensor,
    ) -> torch.Tensor:
        device = hidden_TD.device
        rows_R, label_R, noise_R = rows_R.to(device), label_R.to(device), noise_R.to(device)
        parts = []
        for start in range(0, rows_R.numel(), self._head_rows):
            stop = start + self._head_rows
            logits_RV = self._compute_logits(hidden_TD.index_select(0, rows_R[start:stop]))
            if logits_RV is None:  # a tensor-parallel rank that does not gather the logits
                shape = (rows_R[start:stop].numel(), self._scheme.num_columns)
                parts.append(hidden_TD.new_zeros(shape, dtype=torch.float32))
            else:
                part = sparsify(logits_RV, label_R[start:stop], self._scheme, noise_R[start:stop])
                parts.append(part)
        if not parts:
            return hidden_TD.new_zeros((0, self._scheme.num_columns), dtype=torch.float32)
        return torch.cat(parts)


def _wanted_rows(params: Any, prompt_length: int) -> torch.Tensor:
    """Rows a request asks for; vLLM's own warm-up asks for none and gets all, the worst case."""
    extra = params.extra_kwargs or {}
    if "capture_rows" in extra:
        return torch.tensor(extra["capture_rows"], dtype=torch.int64)
    return torch.arange(max(prompt_length - 1, 0), dtype=torch.int64)


def _noise(params: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return the random bits of a request's rows, by its sample's key."""
    key = int((params.extra_kwargs or {}).get("capture_key", "0"), 16)
    return torch.from_numpy(row_noise(key, rows.numpy()))


def register_capture() -> None:
    """Register the capture variant of the architecture that the environment names."""
    from vllm import ModelRegistry

    architecture = read_variable().architecture
    base = ModelRegistry.models[architecture].load_model_cls()

    def init(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        # Read now, not when registered: vLLM keeps the first class of a name for the process.
        wanted = read_variable()
        self.pooler = CapturePooler(self.compute_logits, wanted.scheme, wanted.head_rows)

    # Made at run time from the registered class, so that no architecture is left out.
    capture = type(
        CAPTURE_PREFIX + architecture, (base,), {"__init__": init, "is_pooling_model": True}
    )
    ModelRegistry.register_model(CAPTURE_PREFIX + architecture, capture)
