"""A model that also sees, as Gemma 3 4B does, teaches and learns text."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cache.io.reader import open_cache
from tests.conftest import Stage, Tiny

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14, "vision_use_head": False,
    "model_type": "siglip_vision_model",
}  # fmt: skip


def _gemma(folder: Path, teacher: Path) -> Path:
    import torch
    from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 608, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 512, "sliding_window": 64, "model_type": "gemma3_text",
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=VISION, image_token_index=600, boi_token_index=601,
        eoi_token_index=602, mm_tokens_per_image=1,
    )  # fmt: skip
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_model_that_sees(tiny: Tiny, stage: Stage, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    gemma, cache, run = _gemma(tmp_path / "gemma", tiny.teacher), tmp_path / "cache", tmp_path / "s"
    one = [*tiny.stage_one, "--teacher_model", gemma, "--corpus.num_samples", "20"]
    stage("cache_teacher", [*one, "--cache_dir", cache]).ok()
    assert open_cache(str(cache)).manifest.codec["vocab_size"] == 608
    two = ["--cache_dir", cache, "--output_dir", run, "--student_model", gemma, "--max_steps", "2"]
    decay = ["--weight_decay", "0.5", "--learning_rate", "0.1"]
    result = stage("train_student", [*two, *decay, "--temperature", "1"]).ok()
    assert "model.vision_tower, model.multi_modal_projector: " in result.err
    assert "(100.0 %)" not in result.err.split("parameters learn")[1].split("\n")[0]
    before, after = (load_file(place / "model.safetensors") for place in (gemma, run / "model"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        unseen = "vision_tower" in name or "multi_modal_projector" in name
        assert torch.equal(weight, after[name]) == unseen, name
