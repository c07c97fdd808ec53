"""The sweep file: a base configuration, what is changed in it, and what is measured."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from pipeline.config import Settings, option
from pipeline.config.fields import leaves, names_of, suggestion
from pipeline.config.files import read_config_file
from pipeline.config.mistakes import describe_errors
from pipeline.data.mixture.settings import CacheShare, read_cache_dir
from pipeline.errors import ConfigError
from pipeline.student.metric_names import DISTANCES

__all__ = ["OBJECTIVES", "SearchSettings", "SweepFile", "read_sweep_file"]

OBJECTIVES = {
    "heldout/kl": "minimize",
    "heldout/kl_bucketed": "minimize",
    "heldout/uld": "minimize",
    "heldout/cross_entropy": "minimize",
    "heldout/perplexity": "minimize",
    "heldout/top1_agreement": "maximize",
    "heldout/acceptance": "maximize",
    "heldout/acceptance_bound": "maximize",
    "heldout/ece": "minimize",
    "train/loss": "minimize",
    **dict.fromkeys((f"train/{distance}" for distance in DISTANCES), "minimize"),
    "train/cross_entropy": "minimize",
    "train/grad_norm": "minimize",
    "throughput/tokens_per_s": "maximize",
    "throughput/tokens_per_s_per_device": "maximize",
    "throughput/mfu": "maximize",
    "data/wait_s": "minimize",
    "memory/peak_gib": "minimize",
    "memory/device_peak_gib": "minimize",
}
"""What runs of stage two log, and which way is better; `objective.py` knows which of the
distances."""

_KINDS = ("grid", "points", "search")


class SearchSettings(Settings):
    """A search by Optuna: what may be tried, how often, and when a run is given up."""

    space: dict[str, Any] = option(..., "by field: a list of choices, or {low, high, log, step}")
    trials: int = option(20, "runs, those given up included", ge=1)
    seed: int = option(0, "of the sampler", ge=0)
    sampler: Literal["tpe", "random"] = option("tpe", "how the next point is chosen")
    startup_trials: int = option(
        5, "runs before the sampler and the pruner look at earlier ones", ge=1
    )
    pruner: Literal["none", "median", "halving"] = option(
        "none",
        "which runs are given up after an evaluation in the middle (train.eval_steps): those worse "
        "than the median of the earlier ones at that step, or all but the best third (halving)",
    )
    warmup_steps: int = option(0, "steps before which no run is given up", ge=0)


class SweepFile(Settings):
    """The keys of a sweep file."""

    base: str = option("stages/configs/student.yaml", "configuration of stage two to start from")
    cache_dir: Annotated[str | tuple[CacheShare, ...] | None, BeforeValidator(read_cache_dir)] = (
        option(None, "the cache, or a mixture of caches; none takes the base's")
    )
    teacher_config: str | None = option(
        None, "configuration of stage one, which makes the cache where there is none; not a mixture"
    )
    overrides: dict[str, Any] = option({}, "settings that differ from the base in every run")
    objective: str = option(
        "heldout/kl",
        "the metric that decides: held-out, or any logged one; heldout/kl is heldout/kl_bucketed "
        "where the cache is a top-k",
    )
    direction: Literal["auto", "minimize", "maximize"] = option(
        "auto", "which way is better; auto knows it for the metrics of this project"
    )
    grid: dict[str, list[Any]] | None = Field(
        default=None, description="by field, the values; every combination is one run"
    )
    points: list[dict[str, Any]] | None = Field(
        default=None, description="the runs one by one, each a mapping of fields to values"
    )
    search: SearchSettings | None = Field(default=None, description="a search by Optuna")

    @model_validator(mode="after")
    def _one_space(self) -> Self:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"found {' and '.join(given) or 'no space'}, expected exactly one of "
                f"{', '.join(_KINDS)}"
            )
        return self

    @model_validator(mode="after")
    def _known_objective(self) -> Self:
        known = self.objective in OBJECTIVES
        if not known and self.objective.startswith(("heldout/", "train/")):
            raise ValueError(
                f"objective: found {self.objective!r}, which no run logs"
                f"{suggestion(self.objective, list(OBJECTIVES))}"
            )
        if not known and "/" not in self.objective:
            raise ValueError(
                f"objective: found {self.objective!r}, expected a logged metric such as "
                f"heldout/kl{suggestion(self.objective, list(OBJECTIVES))}"
            )
        if not known and self.direction == "auto":
            raise ValueError(
                f"direction: found auto with the objective {self.objective}, expected minimize or "
                "maximize"
            )
        return self

    @property
    def maximize(self) -> bool:
        """Whether a larger objective is better."""
        direction = OBJECTIVES[self.objective] if self.direction == "auto" else self.direction
        return direction == "maximize"


def read_sweep_file(path: str, run: type[Settings] | None = None) -> SweepFile:
    """Read and check a sweep file by itself; fields and values of the space are checked later.

    Args:
        path: the file.
        run: the settings that a sweep varies, to say where one of them belongs.

    Raises:
        ConfigError: with every mistake of the file's own keys.
    """
    data = read_config_file(path)
    known = [*SweepFile.model_fields]
    unknown = [key for key in data if key not in known]
    fields = [] if run is None else [*run.model_fields, *names_of(list(leaves(run)))]
    mistakes = [
        f"{key}: found a setting of stage two, expected it under overrides, with one value, or "
        "under grid, with a list of values"
        if key in fields
        else f"{key}: unknown field{suggestion(str(key), known)}"
        for key in unknown
    ]
    try:
        file = SweepFile.model_validate({key: data[key] for key in data if key in known})
    except ValidationError as error:
        # The keys of a space are fields of stage two, so that a mistake there keeps its full name.
        named = [leaf for leaf in leaves(SweepFile) if leaf.dotted not in _KINDS]
        mistakes += describe_errors(error, [*named, *leaves(SearchSettings, ("search",))])
    else:
        if not mistakes:
            return file
    raise ConfigError(mistakes=[f"{path}: {mistake}" for mistake in mistakes])
