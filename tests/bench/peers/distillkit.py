"""DistillKit: its codec of log-probs and ids, and its sparse KL, by its own code.

Settings of the codec: the two that its README recommends and its quick start, the first with
`normalize_t` (which its configuration documents) and the README's example of residual bins. Each is
followed by the KL with both ways to treat the missing mass; `zero` is the loss's default and what
the quick start has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor

from tests.bench.peers.checkout import Checkout, Project, load
from tests.bench.peers.seam import Loss, Peer, Stored, gradient_of, top_k

__all__ = ["PROJECT", "peers"]

PROJECT = Project(
    "distillkit", "DistillKit", "https://github.com/arcee-ai/DistillKit",
    ("distillkit/compression/monotonic_logprobs.py", "distillkit/lossfuncs/kl.py"),
)  # fmt: skip
_RECOMMENDED = {
    "k": 128, "exact_k": 16, "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"], "term_dtype": "float32", "residual_bins": [],
    "delta_encoding": False, "error_diffusion": False,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "recommended": _RECOMMENDED,
    "recommended with normalize_t": {**_RECOMMENDED, "normalize_t": True},
    "budget": {
        **_RECOMMENDED, "k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"],
    },
    "quick start": {
        **_RECOMMENDED, "exact_k": 32, "exact_dtype": "float32", "polynomial_terms": [0, 1, 2],
        "delta_encoding": True,
    },
    "residual bins": {
        **_RECOMMENDED, "polynomial_terms": [0, 1, 2, "sqrt"],
        "residual_bins": [
            {"scale_dtype": "float16", "element_bits": 8, "num_elements": 16},
            {"scale_dtype": "float32", "element_bits": 2, "num_elements": 64},
        ],
    },
}  # fmt: skip
_FILES = (
    "missing_probability", "hsd_mapping", "compression.bitpack", "compression.config",
    "compression.monotonic_logprobs", "compression.densify", "compression.legacy",
    "compression.compressor", "signals", "lossfuncs.common", "lossfuncs.kl",
)  # fmt: skip


@dataclass
class _Setting:
    name: str
    options: str
    kept: float
    losses: Mapping[str, Loss]
    compressor: Any
    rebuilds: bool = True
    _bytes: int = field(default=0, init=False)

    def store(self, teacher_RV: Tensor) -> Stored:
        """Compress and decompress the top k, as [1, R, K], as a captured sequence is."""
        ids_RK, logprobs_RK = top_k(teacher_RV, int(self.kept))
        rows = len(ids_RK)
        if rows == 1:  # their decoder does not read a sequence of one position
            ids_RK, logprobs_RK = ids_RK.repeat(2, 1), logprobs_RK.repeat(2, 1)
        row = self.compressor.compress_from_sparse(ids_RK[None], logprobs_RK[None])
        self._bytes += rows * sum(
            column.shape[-1] * column.element_size() for column in row.values()
        )
        ids_1RK, rebuilt_1RK = (
            part[:, :rows] for part in self.compressor.decompress_to_sparse(row)
        )
        return Stored(ids_1RK[0], rebuilt_1RK[0].float(), {"as_given_1RK": rebuilt_1RK})

    def stored_bytes(self) -> int:
        """The byte columns of a row, without Parquet's own (up to 4 %)."""
        return self._bytes


def peers(checkout: Checkout, vocabulary: int) -> list[Peer]:
    """Return the settings."""
    modules = load(
        checkout,
        {f"distillkit.{name}": f"distillkit/{name.replace('.', '/')}.py" for name in _FILES},
        absent={"distillkit.compression": {"LogprobCompressor": object}},
    )
    kl = modules["distillkit.lossfuncs.kl"]
    missing = modules["distillkit.missing_probability"].MissingProbabilityHandling
    config = modules["distillkit.compression.config"].DistributionQuantizationConfig
    compressor = modules["distillkit.compression.compressor"].LogprobCompressor
    found: list[Peer] = []
    for name, options in SETTINGS.items():
        losses = {handling.value: _loss(kl, handling) for handling in missing}
        words = ", ".join(f"{key} {value}" for key, value in options.items())
        made = compressor(config(d=vocabulary, **options))
        found.append(
            _Setting(
                f"DistillKit {name}",
                f"{words}; loss kl, missing_probability_handling as named",
                options["k"], losses, made,
            )
        )  # fmt: skip
    return found


def _loss(kl: ModuleType, missing: Any) -> Loss:
    def gradient(stored: Stored, student_RV: Tensor, temperature: float) -> Tensor:
        def divergence(logits_RV: Tensor) -> Tensor:
            summed: Tensor = kl.sparse_kl_div(
                logits_RV[None], stored.ids_RK[None].long(), stored.more["as_given_1RK"],
                missing=missing, log_target=True, temperature=temperature,
                target_generation_temperature=1.0,
            )  # fmt: skip
            return summed

        return gradient_of(divergence, student_RV, temperature)

    return Loss(gradient)
