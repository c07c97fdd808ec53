"""The capture inside vLLM: a pooling head that reduces logits to columns on the device.

vLLM's extension points used here: `model_class_overrides`, which says in every process of vLLM
what class serves an architecture, a model class with `is_pooling_model` and a `pooler` for the task
`token_classify`, `additional_config`, and `PoolingParams.extra_kwargs`. The architecture keeps its
own name: vLLM's corrections of settings (a float32 state of Nemotron-H, the sparse attention of
DeepSeek V3.2) go by it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Set
from typing import Any

import numpy as np
import torch
import vllm
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.pooler.common import PoolingParamsUpdate
from vllm.platforms import current_platform
from vllm.v1.pool.metadata import PoolingMetadata

from pipeline.sampling.noise import row_noise
from pipeline.teacher.engines.row_split import RowSplit
from pipeline.teacher.engines.vllm_plan import planned_capture
from pipeline.teacher.engines.vllm_rotary import let_vllm_rotate_each_head
from pipeline.teacher.sparsify.device import SparseScheme, sparsify
from pipeline.teacher.sparsify.requested import with_requested

__all__ = ["CapturePooler", "capture_overrides"]

# The task's name in vLLM for "one output per token"; nothing is classified.
_TASK = "token_classify"
_MARK = "--"
"""Between the parts of the name of a class that captures."""


class CapturePooler(Pooler):
    """Computes the sparse columns of the wanted rows of every scheduled chunk."""

    def __init__(
        self,
        compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
        scheme: SparseScheme,
        head_rows: int,
        split: RowSplit | None = None,
    ) -> None:
        """Keep the model's own head; `head_rows` bounds the logits that exist at one time.

        Args:
            compute_logits: the model's; all tensor-parallel ranks call it on the same rows.
            scheme: what is kept of a row.
            head_rows: at most so many rows of logits at one time.
            split: of the rows among ranks that all get the logits; None: not at all.
        """
        super().__init__()
        self._compute_logits = compute_logits
        self._scheme = scheme
        self._head_rows = head_rows
        self._split = split or RowSplit()

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
        requested: list[torch.Tensor] = []
        splits: list[str] = []
        offset = 0
        for index, count in enumerate(scheduled):
            start = ends[index] - count
            params = pooling_metadata.pooling_params[index]
            wanted = _wanted_rows(params, prompts[index].numel())
            is_inside = (wanted >= start) & (wanted < ends[index])
            inside = wanted[is_inside]
            requested.append(_requested_ids(params, wanted.numel())[is_inside])
            rows.append(inside - start + offset)
            label.append(prompts[index][inside + 1].to(torch.int64))
            noise.append(_noise(params, inside))
            splits.append((params.extra_kwargs or {}).get("capture_split", "train"))
            offset += count
        device = hidden_states.device
        parts: dict[int, torch.Tensor] = {}
        for split in dict.fromkeys(splits):  # of one shard all requests are of one
            scheme = self._scheme.of_split(split)
            some = [index for index, other in enumerate(splits) if other == split]
            rows_R, label_R, noise_R = _to_device(
                device, *(torch.cat([of[i] for i in some]) for of in (rows, label, noise))
            )
            requested_RK = _side_by_side([requested[i] for i in some])
            columns_RC = self._columns(
                hidden_states, rows_R, label_R, noise_R,
                requested_RK.to(device, non_blocking=True), scheme,
            )  # fmt: skip
            pieces = torch.split(columns_RC, [rows[i].numel() for i in some])
            for index, piece in zip(some, pieces, strict=True):
                parts[index] = piece[:, : scheme.num_columns + requested[index].shape[1]]
        outputs: list[torch.Tensor | None] = []
        finished = cursor.get_finished_mask()
        for index, (state, done) in enumerate(
            zip(pooling_metadata.pooling_states, finished, strict=True)
        ):
            part = parts[index]
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
        requested_RK: torch.Tensor,
        scheme: SparseScheme,
    ) -> torch.Tensor:
        parts, width = [], scheme.num_columns + requested_RK.shape[1]
        for start in range(0, rows_R.numel(), self._head_rows):
            some = slice(start, start + self._head_rows)
            logits_RV = self._compute_logits(hidden_TD.index_select(0, rows_R[some]))
            if logits_RV is None:  # a tensor-parallel rank that does not gather the logits
                shape = (rows_R[some].numel(), width)
                parts.append(hidden_TD.new_zeros(shape, dtype=torch.float32))
            else:
                rows = label_R[some], noise_R[some], requested_RK[some]
                parts.append(self._reduced(logits_RV, *rows, scheme))
        if not parts:
            return hidden_TD.new_zeros((0, width), dtype=torch.float32)
        return torch.cat(parts)

    def _reduced(
        self,
        logits_RV: torch.Tensor,
        label_R: torch.Tensor,
        noise_R: torch.Tensor,
        requested_RK: torch.Tensor,
        scheme: SparseScheme,
    ) -> torch.Tensor:
        def reduce(rows: slice) -> torch.Tensor:
            part_RC = sparsify(logits_RV[rows], label_R[rows], scheme, noise_R[rows])
            if not requested_RK.shape[1]:
                return part_RC
            return with_requested(part_RC, logits_RV[rows], label_R[rows], requested_RK[rows])

        return self._split.reduce(reduce, len(logits_RV))


def _tensor_parallel_split() -> RowSplit:
    """Return this rank's place where vLLM gives all ranks the logits; elsewhere one has them."""
    group = get_tp_group()
    if group.world_size == 1 or not current_platform.use_all_gather():
        return RowSplit()
    return RowSplit(
        group.rank_in_group, group.world_size, lambda columns_SC: group.all_gather(columns_SC, 0)
    )


def _to_device(device: torch.device, *rows_R: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return int64 vectors of equal length on the device, by one copy that nobody waits for."""
    together = torch.stack(rows_R)
    if device.type == "cuda":
        together = together.pin_memory()
    return together.to(device, non_blocking=True).unbind()


def _wanted_rows(params: Any, prompt_length: int) -> torch.Tensor:
    """Rows a request asks for; vLLM's own warm-up asks for none and gets all, the worst case."""
    extra = params.extra_kwargs or {}
    if "capture_rows" in extra:
        rows_N = np.frombuffer(extra["capture_rows"], np.int32)
        return torch.from_numpy(rows_N.astype(np.int64))
    return torch.arange(max(prompt_length - 1, 0), dtype=torch.int64)


def _requested_ids(params: Any, rows: int) -> torch.Tensor:
    """Return the ids that a request asks for at each of its rows, int64 [rows, K]; K may be 0."""
    raw = (params.extra_kwargs or {}).get("capture_requested")
    if raw is None or not rows:
        return torch.zeros((rows, 0), dtype=torch.int64)
    ids_NK = np.frombuffer(raw, np.int32).reshape(rows, -1)
    return torch.from_numpy(ids_NK.astype(np.int64))


def _side_by_side(requested: list[torch.Tensor]) -> torch.Tensor:
    """Return all requests' ids [R, K] for the largest K; -1, which is no token, fills up."""
    width = max((ids.shape[1] for ids in requested), default=0)
    pad = torch.nn.functional.pad
    return torch.cat([pad(ids, (0, width - ids.shape[1]), value=-1) for ids in requested])


def _noise(params: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return the random bits of a request's rows, by its sample's key."""
    key = int((params.extra_kwargs or {}).get("capture_key", "0"), 16)
    return torch.from_numpy(row_noise(key, rows.numpy()))


def capture_overrides(model_config: Any) -> dict[str, str]:
    """Return what makes vLLM serve a model by the class that captures: `model_class_overrides`.

    Args:
        model_config: vLLM's own of the model, by which it would choose a class to generate with:
            one of its own, or its wrapper of transformers' where it has none.

    Raises:
        ValueError: vLLM knows no class for the model; as vLLM says it.
    """
    base, architecture = model_config.registry.resolve_model_cls(
        model_config.architectures, model_config=model_config
    )
    base = getattr(base, "captured_class", base)  # of an engine before this one
    # The version is for vLLM, which keeps what it found out about a class of that name on the disk.
    name = _MARK.join((base.__module__, base.__qualname__, vllm.__version__))
    return {architecture: f"{__name__}:{name}"}


def __getattr__(name: str) -> Any:
    """Make the class that captures, of the name that `capture_overrides` gave it.

    Made at run time from the class that vLLM would have used, so that no architecture is left out;
    the name says all that is needed, in whatever process.
    """
    module, mark, rest = name.partition(_MARK)
    if not mark:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _capture_class(getattr(importlib.import_module(module), rest.partition(_MARK)[0]))


@functools.lru_cache
def _capture_class(base: Any) -> Any:
    def init(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        let_vllm_rotate_each_head()  # of several processes each has its own kernels
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        plan = planned_capture(vllm_config.additional_config)
        if plan is not None:  # none where the same process generates with the model later
            self.pooler = CapturePooler(
                self.compute_logits, plan.scheme, plan.head_rows, _tensor_parallel_split()
            )

    own = {
        "__init__": init,
        "__module__": __name__,
        "captured_class": base,
        "is_pooling_model": True,
    }
    # vLLM asks the class's name whether it is its wrapper of transformers' models.
    return type(base.__name__, (base,), own)
