"""What a run of stage one will take, before it takes it: shards, bytes, memory, time."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass

import numpy as np

from pipeline.amounts import BYTES_PER_TOKEN, bytes_per_token, format_bytes, format_duration
from pipeline.cache.layout.names import RECORDS, SPLITS, response_name
from pipeline.cache.layout.recorded import Recorded
from pipeline.errors import ResourceError
from pipeline.models.device import uses_gpu
from pipeline.models.resolve import read_model_config
from pipeline.observe.memory import available_memory_bytes
from pipeline.storage import Store
from pipeline.teacher.capture.fit_tau import mean_entries
from pipeline.teacher.capture.plan import capture_requests
from pipeline.teacher.capture.task import CaptureTask
from pipeline.teacher.costs import cache_bytes, host_memory, stored_bytes
from pipeline.teacher.generation.files import written_files
from pipeline.teacher.generation.plan import WritingTask
from pipeline.teacher.sparsify.columns import kept_entries

__all__ = ["Estimate", "check_resources", "estimate", "print_estimate"]

_TIMED_TOKENS = 768


@dataclass(frozen=True, slots=True)
class Estimate:
    """What all of the plan takes."""

    samples: int
    tokens: int
    loss_tokens: int
    shards: int
    cache_bytes: int
    memory_bytes: int
    at_most: bool = False
    """Whether responses are still to be written, so that tokens and bytes are upper bounds."""
    projected: bool = False
    """Whether the corpus is not prepared yet, so that all is projected from its beginning."""


def estimate(task: CaptureTask, writing: WritingTask | None = None) -> Estimate:
    """Estimate by arithmetic; loads nothing.

    Args:
        task: what is captured.
        writing: the responses, where they are still to be written.
    """
    counts, settings = task.source.projected(), task.teacher.settings
    model = task.teacher.model
    served = settings.engine == "openai"  # a server has the weights
    memory = host_memory(
        0 if served else model.weight_bytes,
        settings,
        task.settings,
        task.scheme,
        vocab_size=task.spec.vocab_size,
        tokens=counts.tokens,
        stored=stored_bytes(read_model_config(model.path)),
        dtype="float32" if served else task.teacher.info.dtype,
    )
    return Estimate(
        samples=counts.samples,
        tokens=counts.tokens,
        loss_tokens=counts.loss_tokens,
        shards=len(task.source.shards)
        if task.source.is_complete and writing is None
        else round(counts.tokens / task.settings.shard_tokens),
        cache_bytes=cache_bytes(
            task.scheme,
            tokens=counts.tokens,
            loss_tokens=counts.loss_tokens,
            generate=task.identity["corpus"].get("generate"),
        ),
        memory_bytes=memory,
        at_most=writing is not None,
        projected=not task.source.is_complete,
    )


def check_resources(
    plan: Estimate, store: Store, *, on_gpu: bool | None = None, written: bool = False
) -> None:
    """Reject a plan that cannot fit, before the teacher is loaded.

    Args:
        plan: what it takes.
        store: the cache's root.
        on_gpu: whether the teacher is on one; None: found out.
        written: the teacher has written its responses there.

    Raises:
        ResourceError: too little memory (on a CPU) or disk.
    """
    if on_gpu is None:
        on_gpu = uses_gpu()
    available = available_memory_bytes()
    if not on_gpu and available is not None and plan.memory_bytes > available:
        raise ResourceError(
            f"the plan needs about {format_bytes(plan.memory_bytes)} of memory, "
            f"{format_bytes(available)} are free",
            do="use a smaller teacher, capture.head_rows, capture.shard_tokens or "
            "teacher.kv_cache_gib",
        )
    if plan.at_most:
        return  # few responses run to their limit; what they need is known once they are there
    free = store.free_bytes()
    present = sum(
        sum(store.sizes(f"data/{split}").values()) if free is not None else 0 for split in SPLITS
    )
    if free is not None and plan.cache_bytes - present > free:
        raise ResourceError(
            f"the cache needs about {format_bytes(plan.cache_bytes)}, "
            f"{format_bytes(free)} are free at {store.url}",
            do="free some space"
            + (
                ", and the same command goes on; in another --cache_dir, as with fewer entries a "
                "position, the responses are written anew"
                if written
                else ", choose another --cache_dir, or fewer entries a position "
                "(--capture.top_k, --capture.mean_entries)"
            ),
        )


def print_estimate(task: CaptureTask, writing: WritingTask | None, store: Store) -> None:
    """Print the plan, and the time from a timing run on a few samples of the corpus.

    Raises:
        ResourceError: too little memory (on a CPU) or disk.
    """
    plan = estimate(task, writing)
    recorded, teacher = Recorded(store.list(RECORDS)), task.teacher
    done = sum(shard.key in recorded for shard in task.source.shards)
    print(f"teacher      {teacher.model.name} ({teacher.model.revision})")
    print(
        f"engine       {teacher.info.engine} {teacher.info.engine_version}, "
        f"{teacher.info.dtype} on {teacher.info.device}"
    )
    most = "at most " if plan.at_most else "about " if plan.projected else ""
    if writing is not None:
        _print_responses(writing, store)
    if plan.projected:
        print(f"samples      about {plan.samples}, projected from the first units of the corpus")
        print(f"tokens       about {plan.tokens}, {plan.loss_tokens} supervised")
    else:
        counts = task.source.counts()
        print(f"samples      {plan.samples} ({counts.train} train, {counts.heldout} held out)")
        print(
            f"tokens       {most}{plan.tokens}, {plan.loss_tokens} supervised; "
            f"{counts.truncated_tokens} cut off"
        )
    print(f"shards       {most}{plan.shards}, {done} of them done, at {store.url}")
    print(f"cache        {most or 'about '}{_cache_size(plan.cache_bytes, plan.loss_tokens)}")
    available = available_memory_bytes()
    free = "unknown" if available is None else format_bytes(available)
    print(f"memory       about {format_bytes(plan.memory_bytes)}, {free} free")
    check_resources(plan, store)
    rate, entries = _timing_run(task)
    if task.scheme.rule is not None:
        taus = ", ".join(f"{tau:.4g}" for tau in task.scheme.rule.taus)
        size = cache_bytes(
            task.scheme,
            tokens=plan.tokens,
            loss_tokens=plan.loss_tokens,
            entries=entries,
            generate=task.identity["corpus"].get("generate"),
        )
        print(
            f"entries      {entries:.1f} a supervised token with capture.tau {taus} (timing run); "
            f"the cache then takes {most or 'about '}{_cache_size(size, plan.loss_tokens)}"
        )
    print(
        f"time         {most or 'about '}{format_duration(plan.tokens / rate)} "
        f"at {rate:.0f} tokens/s "
        f"(timing run{'; the writing comes before it, not timed' if plan.at_most else ''})"
    )


def _cache_size(size: float, loss_tokens: int) -> str:
    """Return the size of the data files, and what that is for each supervised token."""
    return f"{format_bytes(size)}, {bytes_per_token(size, loss_tokens):.1f} {BYTES_PER_TOKEN}"


def _print_responses(writing: WritingTask, store: Store) -> None:
    """Print what the teacher has still to write."""
    prompts, settings = writing.prompts.projected(), writing.plan.settings
    shards = math.ceil(prompts.samples / settings.shard_prompts)
    present = written_files(store)
    done = sum(response_name(index) in present for index in range(shards))
    about = "" if writing.prompts.is_complete else "about "
    print(
        f"prompts      {about}{prompts.samples}, {prompts.tokens} tokens, "
        f"{settings.responses} responses each"
    )
    print(
        f"to write     at most {writing.plan.upper_bound(prompts).loss_tokens} tokens, {about}"
        f"{shards} shards of responses, {done} of them done"
    )


def _timing_run(task: CaptureTask) -> tuple[float, float]:
    """Return tokens a second, and mean entries of a supervised token."""
    engine = task.open_engine()
    try:
        # On a GPU a few tokens measure the launching of kernels: a few full steps there.
        on_gpu = task.teacher.info.device == "cuda"
        enough = 4 * task.teacher.settings.step_tokens if on_gpu else _TIMED_TOKENS
        first = itertools.islice(task.source.first_samples(), 4096 if on_gpu else 64)
        requests = capture_requests(list(first))
        engine.capture(requests[:1])  # the first call pays for allocations
        chosen, tokens = [], 0
        for request in requests:
            chosen.append(request)
            tokens += int(request.input_ids_L.size)
            if tokens >= enough:
                break
        started = time.monotonic()
        columns_NC = np.concatenate(engine.capture(chosen))
        rate = tokens / (time.monotonic() - started)
        if task.scheme.rule is not None:
            return rate, mean_entries(columns_NC, task.scheme, 1.0)
        return rate, kept_entries(columns_NC, task.scheme)
    finally:
        engine.close()
