"""The settings of the data stream; imports no torch, so `--help` stays quick."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from pipeline.config import Settings, option
from pipeline.data.expression import parse_expression

__all__ = ["DataSettings", "Teachers"]

Teachers = Literal["each", "mean", "one"]
_FILTERED_BY = (
    "tokens", "loss_tokens", "surprise", "max_surprise", "entropy", "agreement", "sample",
)  # fmt: skip
"""The names of `pipeline.cache.io.row_statistics`, which imports too much for `--help`."""


class DataSettings(Settings):
    """How rows of the cache become batches. The seed is the run's, not repeated here."""

    pack_length: int | None = option(
        None, "tokens of one pack; none takes the cache's longest allowed sequence", ge=2
    )
    packing: bool = option(
        True, "put several sequences into one pack; attention does not cross between them"
    )
    batch_tokens: int | None = option(
        None,
        "most tokens of an optimiser step, over all processes: sequences up to this budget "
        "in place of a number of packs; at least three times the longest one",
        ge=6,
    )
    lanes: int = option(
        64,
        "most lanes that an epoch is cut into; a step takes as many packs from each, and a process "
        "reads the shards of its own lanes: at least as many as there will ever be processes",
        ge=1,
    )
    shuffle_shards: int = option(
        8,
        "shards, of all lanes together, whose packs are shuffled at a time and which are in "
        "memory, divided among the processes; at least one a lane",
        ge=1,
    )
    teachers: Teachers = option(
        "each",
        "caches of a mixture that hold the same samples: each cache's rows are rows of their own; "
        "or each row once, with the weighted mean of the teachers' distributions (mean: forward_kl "
        "alone, which is linear in them), or with one teacher, chosen by the sample's identity in "
        "proportion to the weights (one)",
    )
    filter: str | None = option(
        None,
        "train only on rows that meet a condition on what the cache knows of them, such as "
        "`surprise < 4 and loss_tokens >= 8`: tokens, loss_tokens, surprise (mean -log p of the "
        "text's token), max_surprise, entropy (mean), agreement (share of tokens above p = 1/2), "
        "sample (0 to 1, by the identity); with + - * / < <= > >= == != and or not; held-out rows "
        "stay all; `none`: all rows",
    )
    prefetch_batches: int = option(4, "steps prepared ahead by the background thread", ge=1)
    read_threads: int = option(2, "threads that read the next shards ahead of their use", ge=0)
    max_entries: int | None = option(
        None, "use only the largest entries of each top-k target; none uses all", ge=1
    )
    tau_factor: float | None = option(
        None,
        "read a sampled cache as if every tau had been so many times larger: fewer entries, "
        "more noise, no bias",
        ge=1,
    )
    disk_cache: str = option(
        "auto",
        "folder on a local disk for copies of a remote cache's shards, shared by processes and "
        "runs, each checked when it is read; `auto`: where several processes of a node read a "
        "remote cache, below XDG_CACHE_HOME or the system's temporary folder, but not in a pod of "
        "Kubernetes, whose limit of local disk cannot be seen; `off`: no copies",
    )
    disk_cache_gib: float = option(
        100,
        "GiB that the copies may take; the ones unused for longest go first; with `auto` at most "
        "half of what is free",
        gt=0,
    )
    on_damaged_shard: Literal["stop", "skip"] = option(
        "stop",
        "`skip`: skip the rows of a training shard that is damaged or missing, and report "
        "them; held-out shards, and the ones that student.reconstruct reads, always stop it",
    )
    stall_warning_s: float = option(
        30, "a step that waits so long for data logs which file it waits for", gt=0
    )
    stall_timeout_s: float = option(
        540, "a step that waits so long for data ends the run; keep it below train.timeout_s", gt=0
    )

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.batch_tokens is not None and self.pack_length is not None:
            raise ValueError(
                f"data.batch_tokens and data.pack_length: found {self.batch_tokens} and "
                f"{self.pack_length}, expected at most one of them"
            )
        return self

    @field_validator("filter")
    @classmethod
    def _can_be_read(cls, text: str | None) -> str | None:
        if text is not None:
            parse_expression(text, _FILTERED_BY)
        return text

    @model_validator(mode="after")
    def _local_copies(self) -> Self:
        if "://" in self.disk_cache:
            raise ValueError(
                f"data.disk_cache: found {self.disk_cache}, expected a folder on a local disk, "
                "auto or off"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Return what decides the losses of a run, of all that is set here."""
        # How data come, not which: a run may go on with other values of these.
        apart = {
            "prefetch_batches", "read_threads", "disk_cache", "disk_cache_gib", "on_damaged_shard",
            "stall_warning_s", "stall_timeout_s",
        }  # fmt: skip
        identity = self.model_dump(mode="json", exclude=apart)
        if self.teachers == "each":
            del identity["teachers"]
        if self.filter is None:
            del identity["filter"]
        return identity
