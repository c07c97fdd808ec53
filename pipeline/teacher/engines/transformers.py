"""The teacher on transformers: padded batches by length, logits in row chunks."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ModelError
from pipeline.models.device import uses_gpu
from pipeline.models.load import load_causal_lm, require_flash_attention
from pipeline.sampling.noise import row_noise
from pipeline.teacher.engines.base import CaptureRequest, EngineInfo
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme, sparsify
from pipeline.teacher.sparsify.requested import with_requested

__all__ = ["TransformersEngine", "open_teacher", "padding_share", "transformers_info"]

_log = logging.getLogger(__name__)

_ROUNDED = 0.02
"""Of the largest logit; bfloat16 keeps 8 bits, and a forgotten scale is off by far more."""


def transformers_info(settings: TeacherSettings) -> EngineInfo:
    """Return the engine's identity.

    Raises:
        ConfigError: flash attention is asked for and not to be had.
    """
    on_gpu = uses_gpu()
    if settings.use_flash_attention:
        require_flash_attention(on_gpu=on_gpu)
    return EngineInfo(
        engine="transformers",
        engine_version=importlib.metadata.version("transformers"),
        dtype=settings.dtype(on_gpu=on_gpu),
        device="cuda" if on_gpu else "cpu",
    )


def open_teacher(settings: TeacherSettings, folder: Path) -> Any:
    """Return the model on its device, for inference.

    Raises:
        ModelError: transformers cannot load the folder as a causal language model.
        ConfigError: flash attention is asked for and not to be had.
    """
    info = transformers_info(settings)
    model = load_causal_lm(
        folder,
        dtype=info.dtype,
        attention=("flash_attention_2",) if settings.use_flash_attention else ("sdpa", "eager"),
        trust_remote_code=settings.trust_remote_code,
    )
    return model.to(info.device).eval()


class TransformersEngine:
    """Loads with AutoModelForCausalLM; right padding, which no real token can see."""

    _checked = False

    def __init__(
        self,
        settings: TeacherSettings,
        capture: CaptureSettings,
        *,
        folder: Path,
        scheme: SparseScheme,
    ) -> None:
        """Load the model.

        Raises:
            ModelError: transformers cannot load the folder as a causal language model.
            ConfigError: flash attention is asked for and not to be had.
        """
        self._model = open_teacher(settings, folder)
        self._device = self._model.device
        self._scheme = scheme
        self._batch_tokens = settings.step_tokens
        self._head_rows = capture.chunk_rows
        self.vocab_size = int(self._model.get_output_embeddings().weight.shape[0])
        self.attention = str(getattr(self._model.config, "_attn_implementation", ""))

    def capture(
        self,
        requests: Sequence[CaptureRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Return the columns of each request, in order.

        Raises:
            ModelError: the model does something unknown to its head's output.
        """
        import torch

        results: list[NDArray[np.float32]] = [np.zeros((0, 0), np.float32)] * len(requests)
        batches = list(self._batches(requests))
        _log.debug(
            "%d sequences in %d batches, %.2f %% of their tokens are padding",
            len(requests), len(batches), 100 * padding_share(requests, batches),
        )  # fmt: skip
        with torch.inference_mode():
            for batch in batches:
                for index, columns in zip(
                    batch, self._forward([requests[i] for i in batch]), strict=True
                ):
                    results[index] = columns
                if on_tokens is not None:
                    on_tokens(sum(int(requests[i].input_ids_L.size) for i in batch))
        return results

    def close(self) -> None:
        """Drop the weights."""
        del self._model

    def _batches(self, requests: Sequence[CaptureRequest]) -> Iterator[list[int]]:
        """Yield indices, longest first, of at most `batch_tokens` padded tokens together."""
        order = sorted(range(len(requests)), key=lambda i: (-requests[i].input_ids_L.size, i))
        batch: list[int] = []
        for index in order:
            longest = requests[batch[0]].input_ids_L.size if batch else 0
            if batch and longest * (len(batch) + 1) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _forward(self, requests: Sequence[CaptureRequest]) -> list[NDArray[np.float32]]:
        import torch

        longest = max(request.input_ids_L.size for request in requests)
        ids_BL = torch.zeros((len(requests), longest), dtype=torch.int64)
        mask_BL = torch.zeros_like(ids_BL)
        for index, request in enumerate(requests):
            ids_BL[index, : request.input_ids_L.size] = torch.from_numpy(request.input_ids_L)
            mask_BL[index, : request.input_ids_L.size] = 1
        batch = {
            "input_ids": ids_BL.to(self._device),
            "attention_mask": mask_BL.to(self._device),
            "use_cache": False,
        }
        results: list[NDArray[np.float32]] = []
        with _HeadInput(self._model) as head:
            logits_B1V = self._model(**batch).logits
        hidden_BLD = head.hidden
        if not self._checked:
            _check_logits(self._model, hidden_BLD[:, 0], logits_B1V[:, 0])
            self._checked = True
        for index, request in enumerate(requests):
            count = request.rows_N.size
            starts = range(0, max(count, 1), self._head_rows)
            chunks = [
                self._columns(hidden_BLD[index], request, slice(start, start + self._head_rows))
                for start in starts
            ]
            results.append(np.concatenate(chunks))
        return results

    def _columns(self, hidden_LD: Any, request: CaptureRequest, some: slice) -> NDArray[np.float32]:
        import torch

        rows_R = request.rows_N[some]
        rows = torch.from_numpy(rows_R).to(self._device)
        label_R = torch.from_numpy(request.input_ids_L[rows_R + 1].astype(np.int64))
        label_R = label_R.to(self._device)
        logits_RV = _logits(self._model, hidden_LD.index_select(0, rows))
        noise_R = None
        scheme = self._scheme.of_split(request.split)
        if scheme.rule is not None:
            noise_R = torch.from_numpy(row_noise(request.key, rows_R)).to(self._device)
        columns = sparsify(logits_RV, label_R, scheme, noise_R)
        if request.requested_NK is not None:
            ids_RK = torch.from_numpy(request.requested_NK[some].astype(np.int64))
            columns = with_requested(columns, logits_RV, label_R, ids_RK.to(self._device))
        return np.asarray(columns.cpu().numpy())


def padding_share(requests: Sequence[CaptureRequest], batches: Sequence[Sequence[int]]) -> float:
    """Return the share of padding in the tokens of `batches` (indices of `requests`)."""
    lengths = [[int(requests[i].input_ids_L.size) for i in batch] for batch in batches]
    padded = sum(max(batch) * len(batch) for batch in lengths)
    return 1 - sum(map(sum, lengths)) / padded if padded else 0.0


class _HeadInput:
    """Keeps what reaches the head, and lets the head see one row instead of all.

    The model's own forward is used to the last hidden state, so every architecture's norms and
    multipliers before the head are right without a list of them.
    """

    def __init__(self, model: Any) -> None:
        self._head = model.get_output_embeddings()
        self.hidden: Any = None

    def __enter__(self) -> _HeadInput:
        def keep(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self.hidden = args[0]
            return (args[0][:, :1], *args[1:])

        self._hook = self._head.register_forward_pre_hook(keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def _check_logits(model: Any, hidden_BD: Any, logits_BV: Any) -> None:
    """Compare logits with those that the model's own forward makes of the same hidden states.

    Raises:
        ModelError: it does to its head's output what its config does not say by a known name.
    """
    ours_BV, theirs_BV = _logits(model, hidden_BD), logits_BV.float()
    error = float((ours_BV - theirs_BV).abs().max() / theirs_BV.abs().max().clamp(min=1e-6))
    if not error < _ROUNDED and bool(theirs_BV.isfinite().all()):
        raise ModelError(
            f"{type(model).__name__}: its logits are not its head's output, scaled and capped as "
            f"its config says (they differ by {error:.0%})",
            expected="a model whose scale and soft cap have a name that is known here",
            do="use --teacher.engine vllm, which asks the model's own code",
        )


def _logits(model: Any, hidden_RD: Any) -> Any:
    """Return the logits of rows of hidden states, with the model's own scaling and cap."""
    from pipeline.loss.head import logit_transform

    transform = logit_transform(model.config)
    logits_RV = model.get_output_embeddings()(hidden_RD).float() * transform.scale
    if transform.softcap is not None:
        logits_RV = transform.softcap * (logits_RV / transform.softcap).tanh()
    return logits_RV
