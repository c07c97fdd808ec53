"""Offline distillation of large language models in two stages that meet in a cache.

```python
from pipeline import open_cache

cache = open_cache("runs/default/cache")
row = next(cache.rows("train"))
row.targets.entries(0)  # token ids and log-probabilities of the first supervised token
```

`pipeline/README.md` has a page on this interface; names are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.program import VERSION

if TYPE_CHECKING:
    from pipeline.api.dataset import ModelInputs, TargetBatch, TargetDataset
    from pipeline.api.process import StageFailed
    from pipeline.api.results import SweepResult, TrainedStudent
    from pipeline.api.runs import cache_teacher, sweep, train_student
    from pipeline.api.sparse_kl import sparse_kl, sparse_kl_of_logits
    from pipeline.api.targets import TeacherTargets
    from pipeline.cache.codec.targets import CachedSequence, SparseTargets
    from pipeline.cache.io.reader import Cache, open_cache
    from pipeline.errors import ConfigError, DistillError

__version__ = VERSION
__all__ = [
    "Cache", "CachedSequence", "ConfigError", "DistillError", "ModelInputs", "SparseTargets",
    "StageFailed",
    "SweepResult", "TargetBatch", "TargetDataset", "TeacherTargets", "TrainedStudent",
    "cache_teacher", "open_cache", "sparse_kl", "sparse_kl_of_logits", "sweep", "train_student",
]  # fmt: skip

_PLACES = {
    "api.dataset": ("ModelInputs", "TargetBatch", "TargetDataset"),
    "api.process": ("StageFailed",),
    "api.results": ("SweepResult", "TrainedStudent"),
    "api.runs": ("cache_teacher", "sweep", "train_student"),
    "api.sparse_kl": ("sparse_kl", "sparse_kl_of_logits"),
    "api.targets": ("TeacherTargets",),
    "cache.codec.targets": ("CachedSequence", "SparseTargets"),
    "cache.io.reader": ("Cache", "open_cache"),
    "errors": ("ConfigError", "DistillError"),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: torch takes seconds, and each stage lacks packages."""
    for place, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{place}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names as well."""
    return sorted({*globals(), *__all__})
