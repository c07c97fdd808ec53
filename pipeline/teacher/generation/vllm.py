"""The teacher writes on vLLM: one seeded request per response, scheduled together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.models.resolve import read_model_config, text_config
from pipeline.teacher.engines.vllm import each_step, load_llm, vllm_info
from pipeline.teacher.engines.vllm_start import set_environment
from pipeline.teacher.generation.base import WriteRequest, Written
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.settings import TeacherSettings

__all__ = ["VllmGenerator"]

_MOST_BIASES = 1024
"""vLLM's GPU sampler takes no more biases a request; heads are padded by a few hundred rows."""
_NEVER = -100.0
"""The lowest bias vLLM knows: a probability of e^-100."""


class VllmGenerator:
    """One vLLM engine that generates, closed before the one that captures is opened."""

    def __init__(
        self,
        teacher: TeacherSettings,
        generate: GenerateSettings,
        *,
        folder: Path,
        ends: Sequence[int],
        vocabulary: int,
        max_length: int,
    ) -> None:
        """Start the engine.

        Raises:
            ConfigError: vLLM is not installed, or cannot serve these settings on this machine.
            ModelError: vLLM refuses the model.
        """
        info = vllm_info(teacher)
        set_environment(
            info.device, processes=teacher.devices, batch_invariant=teacher.batch_invariant
        )
        self._generate = generate
        self._ends = list(ends)
        self._vocabulary = vocabulary
        rows = int(text_config(read_model_config(folder))["vocab_size"])
        padding = range(vocabulary, min(rows, vocabulary + _MOST_BIASES))
        self._bias = dict.fromkeys(padding, _NEVER) or None
        options: dict[str, Any] = {
            "runner": "generate",
            "max_model_len": max_length,
            "max_num_batched_tokens": max(teacher.step_tokens, max_length),
            # A prompt in parts makes vLLM draw and take the draw back after each; on a CPU it
            # cannot (0.32: "CPU Generator does not use offset"). A whole one always fits a step.
            "enable_chunked_prefill": False,
            # Ids in, ids out. The model's own sampling defaults would be applied in silence.
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
        }
        if generate.record_top_k:
            options["max_logprobs"] = generate.record_top_k
        self._llm = load_llm(folder, teacher, info, options)

    def write(
        self,
        requests: Sequence[WriteRequest],
        *,
        on_responses: Callable[[int], None] | None = None,
    ) -> list[Written]:
        """Return the response to each request, in order."""
        # Blocks of an earlier call would make this one's batches, and last bits, depend on it.
        # Within the call the cache computes a prompt once for all of its responses.
        self._llm.reset_prefix_cache()
        prompts: list[Any] = [
            {"prompt_token_ids": request.prompt_ids_L.tolist()} for request in requests
        ]
        with each_step(self._llm, on_responses):
            outputs = self._llm.generate(
                prompts,
                [self._params(request.seed) for request in requests],
                use_tqdm=_counting_bar(on_responses) if on_responses is not None else False,
            )
        written = []
        for request, output in zip(requests, outputs, strict=True):
            completion = output.outputs[0]
            ids_N = np.asarray(completion.token_ids, np.int32)
            assert ids_N.size, request.response_id
            written.append(self._recorded(ids_N, completion.logprobs))
        return written

    def _recorded(self, ids_N: NDArray[np.int32], flat: Any) -> Written:
        """Return a response with what is asked for of vLLM's flat log-probs.

        At each step the drawn token is the first and the K likeliest follow, falling. They are over
        all rows of the head: one that only pads it is no candidate.
        """
        chosen = self._generate
        if flat is None:
            return Written(ids_N, None)
        places = 1 + chosen.record_top_k
        found_NP = np.asarray(flat.token_ids, np.int32).reshape(len(ids_N), places)
        assert np.array_equal(found_NP[:, 0], ids_N)
        logprobs_NP = np.asarray(flat.logprobs, np.float32).reshape(found_NP.shape)
        top_NK = np.where(found_NP[:, 1:] < self._vocabulary, found_NP[:, 1:], -1)
        return Written(
            ids_N,
            logprobs_NP[:, 0].copy() if chosen.record_logprobs else None,
            top_NK.astype(np.int32) if chosen.record_top_k else None,
        )

    def close(self) -> None:
        """Stop the engine and leave no distributed world, which the next engine would trip over."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    def _params(self, seed: int) -> Any:
        from vllm import SamplingParams

        chosen = self._generate
        is_recorded = chosen.record_logprobs or chosen.record_top_k > 0
        return SamplingParams(
            temperature=chosen.temperature,
            top_p=chosen.top_p,
            top_k=chosen.top_k,
            min_p=chosen.min_p,
            seed=seed,
            max_tokens=chosen.max_new_tokens,
            # The list holds every end token, so that both engines stop at the same ones.
            ignore_eos=True,
            stop_token_ids=self._ends,
            logit_bias=self._bias,
            logprobs=chosen.record_top_k if is_recorded else None,
            flat_logprobs=is_recorded,
            detokenize=False,
        )


def _counting_bar(on_responses: Callable[[int], None]) -> Callable[..., Any]:
    """Return what vLLM takes for its progress bar: shows nothing, counts finished requests."""
    from tqdm import tqdm

    started = time.monotonic() - 1e-3

    class Bar(tqdm):  # type: ignore[type-arg]
        # vLLM wraps the prompts in one first, which it iterates over and never updates.
        def __init__(self, iterable: Any = None, **options: Any) -> None:
            super().__init__(iterable, total=options.get("total"), disable=True)

        @property
        def format_dict(self) -> dict[str, Any]:
            # vLLM divides by it; a bar that is not shown says 0.
            return {**super().format_dict, "elapsed": time.monotonic() - started}

        def update(self, n: float | None = 1) -> bool | None:
            on_responses(int(n or 0))
            return None

    return Bar
