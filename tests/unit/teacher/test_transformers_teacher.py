"""The teacher on transformers computes what the model's own forward does, soft caps and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ModelError
from pipeline.models.load import load_causal_lm
from pipeline.sampling.inclusion import InclusionRule
from pipeline.teacher.engines.base import CaptureRequest
from pipeline.teacher.engines.transformers import TransformersEngine
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme
from tests.tiny_families import VOCAB, family_model

GRID, LENGTHS = (1.0, 2.0), (2, 31, 9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a tiny model of each family that is tried here, by its name."""
    found = {}
    for name in ("Llama", "Gemma 2", "RecurrentGemma"):
        found[name] = tmp_path_factory.mktemp("teacher")
        family_model(name).save_pretrained(found[name])
    return found


def _captured(folder: Path) -> tuple[list[CaptureRequest], list[Any]]:
    draw = np.random.default_rng(5)
    requests = [
        CaptureRequest(str(n), draw.integers(3, VOCAB, size).astype(np.int32), np.arange(size - 1))
        for n, size in enumerate(LENGTHS)
    ]
    engine = TransformersEngine(
        TeacherSettings(model=str(folder), engine="transformers"),
        CaptureSettings(top_k=5, temperatures=GRID),
        folder=folder, scheme=SparseScheme(5, GRID),
    )  # fmt: skip
    return requests, engine.capture(requests)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "RecurrentGemma"])
def test_columns_are_those_of_eager_attention_and_the_models_own_logits(
    name: str, folders: dict[str, Path]
) -> None:
    """sdpa leaves Gemma 2's cap of scores out; RecurrentGemma's of logits has its own name."""
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folders[name], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for request, columns_NC in zip(*_captured(folders[name]), strict=True):
        ids_1L = torch.from_numpy(request.input_ids_L.astype(np.int64))[None]
        with torch.inference_mode():
            logits_LV = model(input_ids=ids_1L, use_cache=False).logits[0, :-1]
        label_LV = logits_LV.log_softmax(-1).gather(1, ids_1L[0, 1:, None])
        np.testing.assert_allclose(columns_NC[:, 0], label_LV[:, 0], atol=1e-4)


def test_each_row_is_reduced_by_the_scheme_of_its_split(folders: dict[str, Path]) -> None:
    """Columns of a request are those of an engine whose only scheme is that of its split."""
    folder, grid = folders["Llama"], (1.0, 2.0)
    held = SparseScheme(5, grid, InclusionRule(grid, (0.1, 0.1)))
    ids = np.random.default_rng(3).integers(3, VOCAB, 20).astype(np.int32)

    def columns(scheme: SparseScheme, *splits: str) -> list[Any]:
        engine = TransformersEngine(
            TeacherSettings(model=str(folder), engine="transformers"), CaptureSettings(),
            folder=folder, scheme=scheme,
        )  # fmt: skip
        rows = np.arange(19)
        return engine.capture([CaptureRequest(f"{1:032x}", ids, rows, split=s) for s in splits])

    both = columns(SparseScheme(5, grid, heldout=held), "train", "heldout")
    np.testing.assert_array_equal(both[0], columns(SparseScheme(5, grid), "train")[0])
    np.testing.assert_array_equal(both[1], columns(held, "heldout")[0])
    assert both[1].shape[1] == held.num_columns > both[0].shape[1]


def test_attention_that_leaves_something_out_is_passed_over(folders: dict[str, Path]) -> None:
    def used(name: str, *order: str) -> str:
        model = load_causal_lm(folders[name], dtype="float32", attention=order)
        return str(model.config._attn_implementation)

    assert used("Gemma 2", "sdpa", "eager") == "eager"
    assert used("Llama", "sdpa", "eager") == "sdpa"
    assert used("Gemma 2", "sdpa") == "sdpa", "the only one: its caller refuses it"


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    real = LlamaForCausalLM.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = real(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: its logits are not .* differ by 50%"):
        _captured(folders["Llama"])
