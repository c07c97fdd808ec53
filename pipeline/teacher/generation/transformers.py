"""The teacher writes on transformers: left-padded batches, seeded draws per response."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.teacher.engines.transformers import open_teacher
from pipeline.teacher.generation.base import WriteRequest, Written
from pipeline.teacher.generation.seeded_sampling import SeededSampler
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.settings import TeacherSettings

__all__ = ["TransformersGenerator"]


class TransformersGenerator:
    """Loads with AutoModelForCausalLM and uses its `generate` for everything but the draw."""

    def __init__(
        self,
        teacher: TeacherSettings,
        generate: GenerateSettings,
        *,
        folder: Path,
        ends: Sequence[int],
        vocabulary: int,
    ) -> None:
        """Load the model.

        Raises:
            ModelError: transformers cannot load the folder as a causal language model.
            ConfigError: flash attention is asked for and not to be had.
        """
        from transformers import GenerationConfig

        self._model = open_teacher(teacher, folder)
        self._device = self._model.device
        # A model's own defaults (a repetition penalty, a top-p) would be applied in silence.
        self._model.generation_config = GenerationConfig()
        self._generate = generate
        self._vocabulary = vocabulary
        self._ends = np.array(ends, np.int64)
        self._options = GenerationConfig(
            do_sample=False,  # the sampler makes greedy search a draw
            max_new_tokens=generate.max_new_tokens,
            eos_token_id=list(ends) or None,
            pad_token_id=ends[0] if ends else 0,
            use_cache=True,
        )
        self._batch_tokens = teacher.step_tokens

    def write(
        self,
        requests: Sequence[WriteRequest],
        *,
        on_responses: Callable[[int], None] | None = None,
    ) -> list[Written]:
        """Return the response to each request, in order."""
        import torch

        results: list[Written | None] = [None] * len(requests)
        with torch.inference_mode():
            for batch in self._batches(requests):
                written = self._write_batch([requests[index] for index in batch], on_responses)
                for index, response in zip(batch, written, strict=True):
                    results[index] = response
                if on_responses is not None:
                    on_responses(len(batch))
        return [response for response in results if response is not None]

    def close(self) -> None:
        """Drop the weights."""
        import torch

        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _batches(self, requests: Sequence[WriteRequest]) -> Iterator[list[int]]:
        """Yield indices, longest prompt first; `batch_tokens` bounds a batch's key-value cache.

        A pure function of the requests: the batch decides the last bits of the logits.
        """
        order = sorted(range(len(requests)), key=lambda i: (-requests[i].prompt_ids_L.size, i))
        start = 0
        while start < len(order):
            longest = requests[order[start]].prompt_ids_L.size + self._generate.max_new_tokens
            stop = start + max(1, self._batch_tokens // longest)
            yield order[start:stop]
            start = stop

    def _write_batch(
        self, requests: Sequence[WriteRequest], on_step: Callable[[int], None] | None
    ) -> list[Written]:
        import torch

        longest = max(request.prompt_ids_L.size for request in requests)
        ids_BL = torch.zeros((len(requests), longest), dtype=torch.int64)
        mask_BL = torch.zeros_like(ids_BL)
        for row, request in enumerate(requests):
            ids_BL[row, longest - request.prompt_ids_L.size :] = torch.from_numpy(
                request.prompt_ids_L.astype(np.int64)
            )
            mask_BL[row, longest - request.prompt_ids_L.size :] = 1
        seeds_B = torch.tensor([request.seed for request in requests], dtype=torch.int64)
        sampler = SeededSampler(
            self._generate,
            seeds_B.to(self._device),
            prompt_length=longest,
            vocabulary=self._vocabulary,
        )

        def step(_ids_BL: Any, logits_BV: Any) -> Any:
            if on_step is not None:
                on_step(0)
            return logits_BV

        processors: Any = [sampler, step]
        sequences_BL = self._model.generate(
            input_ids=ids_BL.to(self._device),
            attention_mask=mask_BL.to(self._device),
            generation_config=self._options,
            logits_processor=processors,
        )
        new_BN = sequences_BL[:, longest:].cpu().numpy()
        recorded = sampler.logprobs()
        logprobs_BN = None if recorded is None else recorded.cpu().numpy().astype(np.float32)
        top = sampler.top_ids()
        top_BNK = None if top is None else top.cpu().numpy().astype(np.int32)
        written = []
        for row in range(len(requests)):
            ended = np.flatnonzero(np.isin(new_BN[row], self._ends))
            count = int(ended[0]) + 1 if ended.size else new_BN.shape[1]
            logprobs_N = None if logprobs_BN is None else logprobs_BN[row, :count]
            top_ids_NK = None if top_BNK is None else top_BNK[row, :count]
            written.append(Written(new_BN[row, :count].astype(np.int32), logprobs_N, top_ids_NK))
        return written
