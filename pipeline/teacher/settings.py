"""Settings of the teacher, its engine and what is captured; imports nothing heavy."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from pipeline.config import Settings, option
from pipeline.models.precision import PrecisionSettings

__all__ = [
    "BACKEND", "MOST_ENTRIES", "CaptureSettings", "EndpointSettings", "TeacherSettings",
    "mistakes_with_length",
]  # fmt: skip

BACKEND = "distributed_executor_backend"
"""vLLM's option that says who starts the processes of a teacher."""
MOST_ENTRIES = 4096
"""Of a position, sampled or among the largest; each takes a place in every row of columns."""
_CPU_BATCH_TOKENS, _GPU_BATCH_TOKENS = 2048, 16_384
_CPU_HEAD_ROWS, _GPU_HEAD_ROWS = 256, 1024
"""A chunk of logits in float32, four copies at most: 2.5 GB at 152,000 tokens on a GPU."""
_CPU_STALL_S, _GPU_STALL_S = 3600.0, 600.0
"""One long row of a large teacher on a CPU takes half an hour."""


class EndpointSettings(Settings):
    """Servers that run the teacher, for the engine `openai`."""

    urls: tuple[str, ...] = option(
        (), "engine openai: addresses of vLLM or SGLang servers of one model: [http://host:8000]"
    )
    served_name: str | None = option(None, "the name under which they serve it; none: the only one")
    server: Literal["auto", "vllm", "sglang"] = option("auto", "their kind; auto: found out")
    requests: int = option(8, "requests under way at a time, to each server", ge=1, le=1024)
    timeout_s: float = option(300, "a server that sends nothing for so long has failed", gt=0)
    tries: int = option(
        6, "attempts after which a request has failed that others are answered beside", ge=1
    )
    patience_s: float = option(
        600, "a worker that no server answers for so long ends (exit code 6)", gt=0
    )
    key_variable: str = option(
        "OPENAI_API_KEY", "the environment variable that has the servers' key, if they want one"
    )
    writer_engine: Literal["vllm", "transformers"] = option(
        "vllm", "what runs generate.writer here, beside a teacher that is behind an endpoint"
    )

    @field_validator("urls")
    @classmethod
    def _plain_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            # What is in an address goes into the cache's config.yaml, for everybody to read.
            if "@" in url or "?" in url:
                raise ValueError(
                    "found an address with a name, a password or a query, expected a plain one; "
                    "a key belongs into the variable that key_variable names"
                )
            if not url.startswith(("http://", "https://")) or url in ("http://", "https://"):
                raise ValueError(f"found {url!r}, expected addresses such as http://host:8000")
        if len(set(urls)) != len(urls):
            raise ValueError("an address is there twice")
        return urls

    @field_validator("key_variable")
    @classmethod
    def _a_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]{2,63}", name):
            raise ValueError("expected the name of an environment variable, not the key itself")
        return name


class TeacherSettings(PrecisionSettings):
    """Which model answers, and how it is run."""

    model: str = option(
        "embedded",
        "teacher: a hub id, a model folder, or `embedded` (SmolLM2-135M-Instruct, no download)",
        flag="teacher_model",
    )
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    engine: Literal["vllm", "transformers", "openai"] = option(
        "vllm",
        "what runs the teacher; openai: servers of vLLM or SGLang that teacher.endpoint names, "
        "top-k at temperature 1; teacher.model then gives tokenizer and config alone",
    )
    endpoint: EndpointSettings = EndpointSettings()
    use_flash_attention: bool = option(
        False,
        "flash_attention_2 (needs a GPU and flash-attn); else the engine's own choice",
        flag="use_flash_attention",
    )
    batch_tokens: int | None = option(
        None,
        "tokens in one forward pass (vLLM: max_num_batched_tokens); none: 16384 on a GPU, 2048 on "
        "a CPU",
        ge=16,
        le=1 << 20,
    )
    capture_path: Literal["device", "prompt_logprobs"] = option(
        "device",
        "vLLM only: `device` reduces the logits where they are; `prompt_logprobs` uses vLLM's own "
        "API, which knows no temperature but 1 and no entropy (stored: that of the entries and one "
        "token for the rest, never above it): the fallback and the oracle of the tests",
    )
    tensor_parallel_size: int = option(1, "vLLM only: GPUs that share one teacher", ge=1, le=64)
    gpu_memory_utilization: float = option(0.9, "vLLM only: share of the GPU's memory", gt=0, le=1)
    kv_cache_gib: float = option(
        1.0, "vLLM on a CPU: GiB of key-value cache (a GPU takes what is free)", gt=0
    )
    trust_remote_code: bool = option(False, "run model code that the hub repository brings")
    engine_options: dict[str, Any] = option(
        {},
        "vLLM only: further options of vllm.LLM by their names in Python, as a mapping: "
        "{quantization: fp8, kv_cache_dtype: fp8, pipeline_parallel_size: 2, hf_overrides: {...}}",
    )
    batch_invariant: bool = option(
        False,
        "vLLM on a GPU only: slower kernels whose results do not depend on what else is in the "
        "batch (VLLM_BATCH_INVARIANT; full support from Hopper on)",
    )
    stall_s: float | None = option(
        None,
        "a worker whose teacher finishes no token for this many seconds ends (exit code 6), and "
        "another takes its shard over; none: 600 on a GPU, 3600 on a CPU",
        gt=0,
    )

    load_spread_s: float = option(
        0,
        "in a job's pods: the nodes begin to load the teacher spread over so many seconds, each at "
        "a time by its name, where one file system cannot serve all at once",
        ge=0,
        le=3600,
    )

    @property
    def step_tokens(self) -> int:
        """Tokens of a forward pass; a CPU's where neither the user nor `for_device` has said."""
        return self.batch_tokens or _CPU_BATCH_TOKENS

    def stall(self, *, on_gpu: bool) -> float:
        """Return the seconds without a token after which a worker ends."""
        return self.stall_s or (_GPU_STALL_S if on_gpu else _CPU_STALL_S)

    @property
    def has_logits(self) -> bool:
        """Whether the engine has whole rows of logits, not what an interface tells of them."""
        through_api = self.engine == "vllm" and self.capture_path == "prompt_logprobs"
        return self.engine != "openai" and not through_api

    @property
    def devices(self) -> int:
        """GPUs that one worker takes: those that share a layer, times the stages of a pipeline."""
        stages = self.engine_options.get("pipeline_parallel_size", 1)
        return self.tensor_parallel_size * (stages if isinstance(stages, int) else 1)

    @property
    def is_placed_by_ray(self) -> bool:
        """Whether Ray chooses the teacher's GPUs, on this machine and others."""
        return self.engine_options.get(BACKEND) == "ray"

    @model_validator(mode="after")
    def _options_have_an_engine(self) -> Self:
        if self.batch_invariant and self.engine != "vllm":
            raise ValueError(
                f"teacher.batch_invariant: found it with teacher.engine {self.engine}, expected "
                "it with vllm alone"
            )
        if self.engine_options and self.engine != "vllm":
            raise ValueError(
                f"teacher.engine_options: found {', '.join(self.engine_options)} with "
                f"teacher.engine {self.engine}, expected them with vllm alone"
            )
        return self

    @model_validator(mode="after")
    def _endpoint_has_an_address(self) -> Self:
        if self.engine == "openai" and not self.endpoint.urls:
            raise ValueError(
                "teacher.endpoint.urls: found none with teacher.engine openai, expected the "
                "addresses of its servers, such as [http://host:8000]"
            )
        if self.engine != "openai" and self.endpoint.urls:
            raise ValueError(
                f"teacher.endpoint.urls: found {', '.join(self.endpoint.urls)} with teacher.engine "
                f"{self.engine}, expected them with openai alone"
            )
        return self

    def for_device(self, *, on_gpu: bool) -> Self:
        """Return the settings with a number where the default goes by the device."""
        tokens = _GPU_BATCH_TOKENS if on_gpu else _CPU_BATCH_TOKENS
        return self.model_copy(update={"batch_tokens": self.batch_tokens or tokens})


class CaptureSettings(Settings):
    """What is kept of each distribution, and how it is cut into shards."""

    scheme: Literal["top_k", "threshold", "top_k_sampled"] = option(
        "top_k",
        "top_k: the top_k largest entries and the tail's mass; threshold: entries sampled so that "
        "the target is right on average at every covered temperature, in the fewest bytes; "
        "top_k_sampled: the top_k largest, and a sampled tail",
    )
    top_k: int = option(
        64,
        "entries kept a position because they are the largest (not with threshold)",
        ge=1,
        le=4096,
    )
    tau: tuple[float, ...] = option(
        (),
        "sampled schemes: entries of a probability p above tau are always kept, any other with "
        "probability r / tau, where r is p rounded with a random dither to steps of 1.5 nats: on "
        "average 1.10 p / tau where p is small, 0.85 next to tau (of several temperatures the "
        "root of the sum of the squares); sums of p / probability are unbiased. One value for "
        "each of capture.temperatures, 0 where none is wanted. Empty: 1/28 for temperature 1 "
        "alone; 1/9 for 1 and 1/23.5 for another beside it",
    )
    mean_entries: float | None = option(
        None,
        "sampled schemes: scale tau so that a position keeps this many entries on average, "
        "measured on the first samples; the result is frozen in the cache's identity",
        gt=1,
        le=4096,
    )
    heldout: Literal["auto", "sampled", "same"] = option(
        "auto",
        "held-out rows of a top_k cache: sampled: the top_k largest and a sampled tail, so that "
        "the KL to the teacher is unbiased at every temperature; same: as the training rows, "
        "whose KL is a lower bound; auto: sampled where the engine has whole rows of logits",
    )
    temperatures: tuple[float, ...] = option(
        (1.0, 2.0), "temperatures for which students get the exact normaliser; must contain 1"
    )
    shard_tokens: int = option(1_000_000, "tokens in a shard, about", ge=64)
    lease_s: float = option(
        120, "a shard whose worker gives no sign for this many seconds is taken over", gt=0
    )
    tries: int = option(
        3, "how often a row may fail (not finite, an error, a crash) before it is quarantined", ge=1
    )
    max_quarantined_fraction: float = option(
        0.01, "a run stops when more of its rows than this (and more than one) fail", ge=0, le=1
    )
    head_rows: int | None = option(
        None,
        "positions whose logits exist at the same time; none: 1024 on a GPU, 256 on a CPU",
        ge=1,
        le=65_536,
    )

    @property
    def chunk_rows(self) -> int:
        """Positions of a chunk; a CPU's where neither the user nor `for_device` has said."""
        return self.head_rows or _CPU_HEAD_ROWS

    def for_device(self, *, on_gpu: bool) -> Self:
        """Return the settings with a number where the default goes by the device."""
        rows = _GPU_HEAD_ROWS if on_gpu else _CPU_HEAD_ROWS
        return self.model_copy(update={"head_rows": self.head_rows or rows})

    # Of one field each, so that both are reported together with the mistakes of others.
    @field_validator("temperatures")
    @classmethod
    def _sane_temperatures(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        if not given:
            raise ValueError("found an empty list, expected at least [1.0]")
        if any(not 0.05 <= value <= 100 for value in given):
            raise ValueError("expected values from 0.05 to 100")
        if 1.0 not in given:
            raise ValueError("1.0 is missing, expected it in the list")
        if len(set(given)) != len(given):
            raise ValueError("a value is there twice")
        return given

    @field_validator("tau")
    @classmethod
    def _sane_tau(cls, taus: tuple[float, ...]) -> tuple[float, ...]:
        if taus and (not all(0 <= value < 1 for value in taus) or not any(taus)):
            raise ValueError(
                f"found {list(taus)}, expected values in (0, 1), or 0 for a temperature that no "
                "entries are sampled for; not all 0"
            )
        entries = sum(1 / value for value in taus if value)
        if entries > MOST_ENTRIES:
            raise ValueError(
                f"found {list(taus)}, by which a position may keep {entries:.0f} entries, expected "
                f"at most {MOST_ENTRIES}: the sum of 1 / tau"
            )
        return taus

    @model_validator(mode="after")
    def _tau_fits(self) -> Self:
        if self.scheme == "top_k" and (self.tau or self.mean_entries is not None):
            raise ValueError(
                "capture.tau and capture.mean_entries are of the sampled schemes: found them with "
                "capture.scheme top_k; choose --capture.scheme threshold or top_k_sampled"
            )
        if not self.tau:
            return self
        if len(self.tau) != len(self.temperatures):
            raise ValueError(
                f"capture.tau: found {len(self.tau)} values, expected one for each of the "
                f"{len(self.temperatures)} capture.temperatures"
            )
        highest = max(self.temperatures)
        if not self.tau[self.temperatures.index(highest)]:
            raise ValueError(
                f"capture.tau: found 0 at temperature {highest:g}, the highest of "
                "capture.temperatures, expected a value in (0, 1) there: entries sampled for lower "
                "ones alone leave a student at it nothing but noise"
            )
        return self

    @model_validator(mode="after")
    def _heldout_fits(self) -> Self:
        if self.scheme != "top_k" and self.heldout == "sampled":
            raise ValueError(
                f"capture.heldout: found sampled with capture.scheme {self.scheme}, expected auto: "
                "all rows are sampled there, and their KL is unbiased"
            )
        return self

    @model_validator(mode="after")
    def _entries_fit(self) -> Self:
        least = self.top_k + 1 if self.scheme == "top_k_sampled" else 1
        if self.mean_entries is not None and self.mean_entries <= least:
            raise ValueError(
                f"capture.mean_entries: found {self.mean_entries:g}, expected more than {least}, "
                "which are kept in any case"
            )
        return self


def mistakes_with_length(capture: CaptureSettings, max_length: int) -> list[str]:
    """Return what does not fit between the shards and the longest sequence."""
    if capture.shard_tokens >= max_length:
        return []
    return [
        f"capture.shard_tokens: found {capture.shard_tokens}, expected at least "
        f"corpus.max_length ({max_length})"
    ]
