"""How far back the layers of published configs look."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.models.shape import ModelShape
from pipeline.models.windows import attended_pairs, attention_windows

FULL = None


@pytest.mark.parametrize(
    ("text", "windows"),
    [
        ({}, (FULL,) * 4),
        ({"sliding_window": None}, (FULL,) * 4),
        ({"sliding_window": 8}, (8,) * 4),  # Mistral
        ({"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 4}, (FULL,) * 4),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
         (FULL, FULL, FULL, 8)),
        ({"sliding_window": 8, "model_type": "gemma2"}, (8, FULL, 8, FULL)),
        ({"sliding_window": 8, "sliding_window_pattern": 4}, (8, 8, 8, FULL)),
        ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
         (8, FULL, 8, FULL)),
        ({"layer_types": ["conv", "full_attention", "linear_attention", "mamba"]}, (0, FULL, 0, 0)),
        ({"layers_block_type": ["mamba", "attention", "hybrid", "mamba"]}, (0, FULL, FULL, 0)),
        ({"attention_chunk_size": 10, "layer_types": ["chunked_attention", "full_attention"] * 2},
         (5, FULL, 5, FULL)),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, (8,) * 4),  # of another depth
    ],
)  # fmt: skip
def test_windows(text: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert attention_windows(text, 4) == windows


@pytest.mark.parametrize(("window", "pairs"), [(None, 50), (10, 50), (99, 50), (4, 32), (0, 0)])
def test_pairs(window: int | None, pairs: float) -> None:
    assert attended_pairs(10, window) == pairs


def test_a_pruned_shape_has_the_windows_of_its_layers() -> None:
    shape = ModelShape(
        hidden=8, layers=3, vocab_size=9, inner=8, heads=1, kv_heads=1, head_dim=8, tied=True,
        windows=(4, None, 0),
    )  # fmt: skip
    pruned = shape.pruned((2, 0))
    assert (pruned.layers, pruned.windows) == (2, (0, 4))
