"""CPU time of the capture relative to the bare prefill of the same engine, on the same tokens.

`python -m tests.bench.capture` measures the embedded teacher on its default corpus (the head is a
fifth of its weights); `--shape 7b` a random teacher with the proportions of a 7B model (the head is
7 %). One thread, CPU seconds of this process, the best of several interleaved rounds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np

from pipeline.models.resolve import read_model_config, resolve_model
from pipeline.sampling.inclusion import InclusionRule
from pipeline.teacher.engines.base import CaptureRequest
from pipeline.teacher.engines.vllm import VllmEngine
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme

ROUNDS = 3
SCHEMES = {
    "top64": SparseScheme(64, (1.0, 2.0)),
    "threshold": SparseScheme(0, (1.0,), InclusionRule((1.0,), (1 / 30,))),
    "threshold, two temperatures": SparseScheme(
        0, (1.0, 2.0), InclusionRule((1.0, 2.0), (1 / 12, 1 / 25))
    ),
}


def embedded(tokens: int) -> tuple[Path, list[CaptureRequest], int]:
    """Return the default teacher, the first requests of its default corpus, and the length."""
    from pipeline.corpus.settings import CorpusSettings
    from pipeline.models.tokenizer import load_tokenizer
    from pipeline.teacher.capture.plan import capture_requests
    from tests.whole_corpus import build_corpus

    folder = resolve_model("embedded", revision=None, role="teacher").path
    settings = CorpusSettings(dataset_name="embedded", max_length=512)
    corpus = build_corpus(settings, tokenizer=load_tokenizer(folder), seed=42)
    chosen = []
    for request in capture_requests(corpus.samples[:2000:7]):
        chosen.append(request)
        tokens -= request.input_ids_L.size
        if tokens <= 0:
            break
    return folder, chosen, 512


def shape_of_7b(tokens: int, folder: Path) -> tuple[Path, list[CaptureRequest], int]:
    """Save a random teacher of 7B proportions (head 7 % of the weights) and make requests."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import make_tokenizer, write_corpus

    config = LlamaConfig(
        vocab_size=12_800, hidden_size=2048, intermediate_size=8192, num_hidden_layers=6,
        num_attention_heads=16, num_key_value_heads=4, head_dim=128, tie_word_embeddings=False,
        max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(write_corpus(folder / "corpus")).save_pretrained(folder)
    draw = np.random.default_rng(0)
    length = 256
    return (
        folder,
        [
            CaptureRequest(
                f"{index:032x}",
                draw.integers(3, 12_000, length).astype(np.int32),
                np.arange(length - 1),
            )
            for index in range(max(1, tokens // length))
        ],
        length,
    )


def best(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the minimal CPU seconds of each call, measured in turn, after one warm-up call."""
    seconds = dict.fromkeys(calls, float("inf"))
    for round_ in range(ROUNDS + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            if round_:
                seconds[name] = min(seconds[name], time.process_time() - started)
    return seconds


def measure(folder: Path, requests: list[CaptureRequest], length: int) -> dict[str, float]:
    """Return the ratio of each path to the bare prefill of its engine."""
    settings = TeacherSettings(model=str(folder), batch_tokens=2048)
    bare_requests = [CaptureRequest(r.sample_id, r.input_ids_L, r.rows_N[:0]) for r in requests]
    ratios: dict[str, float] = {}
    for name, scheme in SCHEMES.items():
        engine = VllmEngine(
            settings, CaptureSettings(), folder=folder, scheme=scheme, max_length=length
        )
        seconds = best(
            {
                "bare": lambda e=engine: e.capture(bare_requests),
                "capture": lambda e=engine: e.capture(requests),
            }
        )
        ratios[name] = seconds["capture"] / seconds["bare"]
        ratios.setdefault("head product", 1 + _head_seconds(folder, requests) / seconds["bare"])
        engine.close()
    path = TeacherSettings(model=str(folder), batch_tokens=2048, capture_path="prompt_logprobs")
    engine = VllmEngine(
        path, CaptureSettings(), folder=folder, scheme=SparseScheme(64, (1.0,)), max_length=length
    )
    seconds = best(
        {
            "bare": lambda: _prefill(engine, requests),
            "capture": lambda: engine.capture(requests),
        }
    )
    ratios["prompt log-probs 64, flat"] = seconds["capture"] / seconds["bare"]
    engine.close()
    return ratios


def _prefill(engine: VllmEngine, requests: list[CaptureRequest]) -> None:
    """Prefill the prompts with vLLM's ordinary engine and nothing else."""
    from vllm import SamplingParams

    engine._llm.generate(
        [{"prompt_token_ids": r.input_ids_L.tolist()} for r in requests],
        SamplingParams(max_tokens=1, temperature=0.0, detokenize=False),
        use_tqdm=False,
    )


def _head_seconds(folder: Path, requests: list[CaptureRequest]) -> float:
    """CPU seconds of the head's matrix product alone for all wanted rows, in the same chunks."""
    import torch

    rows = sum(r.rows_N.size for r in requests)
    config = read_model_config(folder)
    vocab, width = int(config["vocab_size"]), int(config["hidden_size"])
    weight_VD, hidden_RD = torch.randn(vocab, width), torch.randn(256, width)
    out_RV = torch.empty(256, vocab)
    seconds = best({"head": lambda: torch.mm(hidden_RD, weight_VD.t(), out=out_RV)})["head"]
    return seconds * rows / 256


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=("embedded", "7b"), default="embedded")
    parser.add_argument("--tokens", type=int, default=1500)
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        if arguments.shape == "7b":
            folder, requests, length = shape_of_7b(arguments.tokens // 4, Path(scratch))
        else:
            folder, requests, length = embedded(arguments.tokens)
        tokens = sum(r.input_ids_L.size for r in requests)
        loss_tokens = sum(r.rows_N.size for r in requests)
        ratios = measure(folder, requests, length)
    print(f"{tokens} tokens, {loss_tokens} supervised; CPU time over the bare prefill, same engine")
    for name, ratio in ratios.items():
        print(f"  {name:<28} {ratio:.3f}")
    suffix = "_7b" if arguments.shape == "7b" else ""
    print(f"FIGURE capture_cpu_ratio_top64{suffix} {ratios['top64']:.3f}")
    print(f"FIGURE capture_cpu_ratio_threshold{suffix} {ratios['threshold']:.3f}")


if __name__ == "__main__":
    main()
