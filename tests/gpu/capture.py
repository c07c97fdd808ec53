"""vLLM's capture: against transformers' own forward pass, and its time over the bare prefill."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.check import Figure, Place, at_least, at_most
from tests.tiny import make_teacher, make_tokenizer, write_corpus

__all__ = ["against_transformers", "over_prefill"]

TOP_K, GRID = 20, (1.0, 2.0)


def against_transformers(place: Place) -> list[Figure]:
    """Capture with both engines in float32, and with vLLM in bfloat16 where there is a GPU."""
    device = place.device
    figures = []
    for dtype, limit in (("float32", 1e-3), ("bfloat16", 0.2)):
        if dtype == "bfloat16" and device != "cuda":
            continue
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            ours, theirs = _captured(root, dtype)
        first = 2 + 2 * len(GRID)
        ids, other_ids = (np.sort(part[:, first : first + TOP_K]) for part in (ours, theirs))
        same = (ids == other_ids).all(axis=1)
        gap = np.abs(ours[:, :first] - theirs[:, :first])
        figures += [
            at_least(
                f"rows_of_the_same_ids_{dtype}", same.mean(), 0.99 if dtype == "float32" else 0
            ),
            at_most(f"largest_difference_{dtype}", gap.max(), limit),
        ]
    return figures


def _captured(root: Path, dtype: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the columns of vLLM in `dtype` and of transformers in float32, all rows."""
    corpus = write_corpus(root / "corpus")
    folder = make_teacher(root / "teacher", make_tokenizer(corpus))
    draw = np.random.default_rng(5)
    requests = []
    for length in (2, 3, 17, 64, 100, 120, 40, 9):
        rows = sorted(draw.choice(length - 1, max(1, length // 2), replace=False).tolist())
        requests.append((draw.integers(3, 300, length).tolist(), rows))
    plan = {
        "folder": str(folder), "out": str(root), "top_k": TOP_K, "temperatures": GRID,
        "max_length": 120, "requests": requests,
    }  # fmt: skip
    engines = {
        "vllm": {"engine": "vllm", "bf16": dtype == "bfloat16", "batch_tokens": 512},
        "transformers": {"engine": "transformers", "bf16": False},
    }
    for name, teacher in engines.items():
        _run(root, {**plan, "jobs": [{"name": name, "teacher": teacher}]})
    return _columns(root / "vllm-0.npz"), _columns(root / "transformers-0.npz")


def _run(root: Path, plan: dict[str, Any]) -> None:
    """Carry out a plan in a process of its own: a second engine finds the first one's world."""
    file = root / f"{plan['jobs'][0]['name']}.json"
    file.write_text(json.dumps(plan))
    subprocess.run([sys.executable, "-m", "tests.capture_once", str(file)], check=True)


def _columns(file: Path) -> NDArray[np.float32]:
    with np.load(file) as data:
        return np.concatenate([data[str(number)] for number in range(len(data.files))])


def over_prefill(place: Place) -> list[Figure]:
    """Time the capture of all rows over the prefill of the same tokens, in one engine each."""
    device = place.device
    from pipeline.teacher.engines.base import CaptureRequest
    from pipeline.teacher.engines.vllm import VllmEngine
    from pipeline.teacher.settings import CaptureSettings, TeacherSettings
    from tests.gpu.reduction import SCHEMES

    rows, length = (64, 2048) if device == "cuda" else (2, 64)
    figures = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = _teacher(Path(scratch), device)
        draw = np.random.default_rng(0)
        requests = [
            CaptureRequest(
                f"{row:032x}", draw.integers(3, 500, length).astype(np.int32), np.arange(length - 1)
            )
            for row in range(rows)
        ]
        bare = [CaptureRequest(r.sample_id, r.input_ids_L, r.rows_N[:0]) for r in requests]
        settings = TeacherSettings(
            model=str(folder),
            batch_tokens=16_384 if device == "cuda" else 512,
        )  # fmt: skip
        engine = VllmEngine(
            settings, CaptureSettings(), folder=folder, scheme=SCHEMES["threshold"],
            max_length=length,
        )  # fmt: skip
        seconds: dict[str, list[float]] = {"bare": [], "capture": []}
        for _ in range(4):
            for name, several in (("bare", bare), ("capture", requests)):
                started = time.perf_counter()
                engine.capture(several)
                seconds[name].append(time.perf_counter() - started)
        engine.close()
    ratio = min(seconds["capture"][1:]) / min(seconds["bare"][1:])
    figures.append(
        at_most("capture_over_prefill_threshold", ratio, 1.3)
        if device == "cuda"
        else Figure("capture_over_prefill_threshold", ratio)
    )
    return figures


def _teacher(root: Path, device: str) -> Path:
    """Save a random teacher: 1.5B parameters with Qwen's head on a GPU, a tiny one on a CPU."""
    corpus = write_corpus(root / "corpus")
    tokenizer = make_tokenizer(corpus)
    if device != "cuda":
        return make_teacher(root / "teacher", tokenizer)
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=4096,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    folder = root / "teacher"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
