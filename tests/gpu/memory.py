"""Memory and speed of a student of half a billion weights, beside what was forecast.

Its step is compared with its own matrix products: the operations that it needs, at the rate of one
large product on the same device.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from pipeline.models.resolve import read_model_config
from pipeline.models.shape import model_shape
from pipeline.student.costs import training_flops
from pipeline.student.settings.student import StudentSettings
from tests.gpu.check import Figure, NeedsHardwareError, Place, at_least, at_most
from tests.gpu.runs import Runs

__all__ = ["against_the_forecast"]

_UNITS = {"MiB": 1 / 1024, "GiB": 1.0, "TiB": 1024.0}


def against_the_forecast(place: Place) -> list[Figure]:
    """Train for some steps; compare the device's peak memory with the plan of `--dry-run`."""
    runs = Runs(place)
    student = _student(runs.root / "half-a-billion", runs.root / "teacher")
    flags = [
        *runs.flags, "--student_model", student, "--student.keep_layers", "none",
        "--per_device_train_batch_size", 64, "--gradient_accumulation_steps", 1,
        "--max_steps", 12, "--train.zero_stage", 1, "--learning_rate", 1e-5,
    ]  # fmt: skip
    planned = _planned([*flags, "--output_dir", runs.root / "planned"])
    runs.flags = flags
    runs.start("large").wait()
    lines = (runs.root / "large/metrics.jsonl").read_text().splitlines()
    last = [record for record in map(json.loads, lines) if "train/loss" in record][-1]
    if "memory/device_peak_gib" not in last:
        raise NeedsHardwareError("needs a device whose memory torch counts")
    return [
        at_most("peak_memory_over_forecast", last["memory/device_peak_gib"] / planned, 1.1),
        at_least("forecast_is_not_far_above", last["memory/device_peak_gib"] / planned, 0.4),
        Figure("peak_memory_gib", last["memory/device_peak_gib"]),
        Figure("tokens_per_s", last["throughput/tokens_per_s"]),
        Figure("mfu", last.get("throughput/mfu", float("nan"))),
        Figure("step_over_its_matmuls", _over_matmuls(student, last["throughput/tokens_per_s"])),
    ]


def _planned(flags: list[object]) -> float:
    """Return the memory in GiB that `--dry-run` names."""
    command = [sys.executable, "-m", "stages", "train-student", *map(str, flags), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"^memory\s+about ([\d.]+) ([MGT]iB)", done.stdout, re.MULTILINE)
    assert found, done.stdout
    return float(found[1]) * _UNITS[found[2]]


def _over_matmuls(student: Path, tokens_per_s: float) -> float:
    """Return the time of a token over that of its matrix products, with its attention left out."""
    import torch

    shape = model_shape(read_model_config(student))
    flops = training_flops(shape, StudentSettings(), tokens=1)
    side, repeats = 8192, 20
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    torch.cuda.synchronize()
    rate = 2.0 * side**3 * repeats / (time.perf_counter() - started)
    return rate / (flops * tokens_per_s)


def _student(folder: Path, teacher: Path) -> Path:
    """Save random weights of Qwen2.5-0.5B's shape with the tiny teacher's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return folder
