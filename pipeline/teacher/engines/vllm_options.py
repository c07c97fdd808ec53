"""The options that vLLM is started with: the user's by vLLM's names, beside those set here."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.nearest import did_you_mean
from pipeline.errors import ConfigError
from pipeline.program import how_to_install
from pipeline.teacher.engines.base import EngineInfo
from pipeline.teacher.settings import BACKEND, TeacherSettings

__all__ = ["capture_sequences", "check_engine_options", "common_options", "known_options"]

_BY_RAY = (
    "machines that share a teacher are Ray's (distributed_executor_backend: ray); one of them runs "
    "this stage"
)
_TAKEN = {
    "model": "teacher.model names it",
    "tokenizer": "samples are tokenised before vLLM starts",
    "tokenizer_mode": "samples are tokenised before vLLM starts",
    "skip_tokenizer_init": "samples are tokenised before vLLM starts",
    "revision": "use teacher.revision",
    "tokenizer_revision": "use teacher.revision",
    "code_revision": "use teacher.revision",
    "hf_token": "a secret does not belong to a cache's identity; set HF_TOKEN",
    "dtype": "use teacher.bf16 or teacher.fp16",
    "trust_remote_code": "use teacher.trust_remote_code",
    "tensor_parallel_size": "use teacher.tensor_parallel_size",
    "nnodes": _BY_RAY,
    "node_rank": _BY_RAY,
    "master_addr": _BY_RAY,
    "master_port": _BY_RAY,
    "data_parallel_size": "start more workers instead (NPROC=, GPUS=): each takes shards",
    "gpu_memory_utilization": "use teacher.gpu_memory_utilization",
    "max_num_batched_tokens": "use teacher.batch_tokens",
    "max_model_len": "use corpus.max_length",
    "runner": "the capture is a pooling model, the writing of responses a generating one",
    "convert": "the capture is a pooling model, the writing of responses a generating one",
    "pooler_config": "the capture brings its own",
    "model_class_overrides": "the capture brings its own class",
    "additional_config": "it tells vLLM's processes what to capture",
    "enable_prefix_caching": "log-probs of a prompt need every row computed",
    "enable_chunked_prefill": "it is on for the capture and off for writing responses",
    "max_logprobs": "use capture.top_k",
    "generation_config": "how responses are drawn is said under generate",
    "override_generation_config": "how responses are drawn is said under generate",
    "enable_lora": "merge the adapter into the weights: requests name no adapter here",
    "speculative_config": "a prefill has no token to guess, and responses are drawn by seeds here",
    "seed": "the capture draws by each sample's name, responses by their own seeds",
    "disable_log_stats": "this stage reports its own numbers",
    "use_tqdm_on_load": "this stage shows its own progress",
}
"""Options that the stage sets itself, and what is to be done instead."""


def check_engine_options(options: Mapping[str, Any]) -> None:
    """Reject options that vLLM does not know, or that are not the user's to set.

    Args:
        options: `teacher.engine_options`, by vLLM's names.

    Raises:
        ConfigError: with all mistakes.
    """
    if not options:
        return
    known = known_options()
    mistakes = []
    for name in options:
        said = f"teacher.engine_options: found {name}"
        if name in _TAKEN:
            mistakes.append(f"{said}, which this stage sets itself: {_TAKEN[name]}")
        elif known and name not in known:
            near = did_you_mean(name, known - _TAKEN.keys())
            mistakes.append(
                f"{said}, expected an option of vllm.LLM by its name in Python"
                + (f"; {near}" if near else "")
            )
    if options.get(BACKEND) == "ray" and importlib.util.find_spec("ray") is None:
        mistakes.append(
            f"teacher.engine_options: found {BACKEND} ray without the package ray, expected it on "
            f"every machine of the teacher; {how_to_install('teacher', 'ray')}"
        )
    overrides = options.get("hf_overrides", {})
    if not isinstance(overrides, Mapping):
        mistakes.append(
            f"teacher.engine_options: found hf_overrides {overrides!r}, expected a mapping"
        )
    if mistakes:
        raise ConfigError(mistakes=mistakes)


@functools.cache
def known_options() -> frozenset[str]:
    """Return the names that `vllm.LLM` takes, read from its source; none where that looks foreign.

    Read, not imported: vLLM takes ten seconds to import, and a mistake is to be told at once.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return frozenset()
    root = Path(spec.origin).parent
    names: set[str] = set()
    for file, owner in (("engine/arg_utils.py", "EngineArgs"), ("entrypoints/llm.py", "LLM")):
        try:
            tree = ast.parse((root / file).read_text(encoding="utf-8"))
        except (OSError, SyntaxError):
            return frozenset()
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == owner:
                names |= _fields(node) if owner == "EngineArgs" else _parameters(node)
    return frozenset(names)


def _fields(node: ast.ClassDef) -> set[str]:
    return {
        one.target.id
        for one in node.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    }


def _parameters(node: ast.ClassDef) -> set[str]:
    for one in node.body:
        if isinstance(one, ast.FunctionDef) and one.name == "__init__":
            return {argument.arg for argument in (*one.args.args, *one.args.kwonlyargs)} - {"self"}
    return set()


def common_options(
    folder: Path, teacher: TeacherSettings, info: EngineInfo, own: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of `vllm.LLM`: those of every use here, the user's over them, then `own`.

    Args:
        folder: the model's files.
        teacher: memory, parallelism, attention, and the user's options.
        info: device and dtype.
        own: those of this use; of `hf_overrides` and `compilation_config` both sides are kept, the
            user's where they meet.
    """
    common: dict[str, Any] = {
        "model": str(folder),
        "dtype": info.dtype,
        "max_num_seqs": min(256, teacher.step_tokens),
        "tensor_parallel_size": teacher.tensor_parallel_size,
        "trust_remote_code": teacher.trust_remote_code,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if info.device == "cpu":
        common["enforce_eager"] = True
        common["kv_cache_memory_bytes"] = int(teacher.kv_cache_gib * (1 << 30))
    else:
        common["gpu_memory_utilization"] = teacher.gpu_memory_utilization
        # It picks kernels by their time on the day, and a worker's bytes with them.
        common["enable_flashinfer_autotune"] = False
    if teacher.use_flash_attention:
        common["attention_backend"] = "FLASH_ATTN"
    given = dict(teacher.engine_options)
    if "kernel_config" in given:  # vLLM takes either
        common.pop("enable_flashinfer_autotune", None)
    options = {**common, **own, **given}
    for name in ("hf_overrides", "compilation_config"):
        if isinstance(own.get(name), Mapping) and isinstance(given.get(name), Mapping):
            options[name] = {**own[name], **given[name]}
    return options


def capture_sequences(step_tokens: int) -> int:
    """Return how many sequences a step of the capture may hold, by its tokens.

    As many as fill a step with rows of 16 tokens; 256 at least, which is what small steps had.
    """
    return min(max(256, step_tokens // 16), 4096, step_tokens)
