"""CPU time of the capture over the prefill and the head's product on the same rows; bytes on a GPU.

`python -m tests.bench.capture` measures the embedded teacher on its default corpus (the head is a
fifth of its weights); `--shape 7b` a random teacher with the proportions of a 7B model (the head is
7 %). One thread, CPU seconds of this process. A round measures the bare prefill, the head's product
alone (by the engine's own function, in its chunks) and the capture, one after the other, in turn
from the first and from the last; a figure is the mean of the rounds' ratios. Rounds go on until the
standard error is small.

What it says of a GPU is arithmetic: the loads and stores of the kernels, which `make test-triton`
counts in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np

from pipeline.models.resolve import resolve_model
from pipeline.teacher.engines.base import CaptureRequest
from pipeline.teacher.engines.vllm import VllmEngine
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme
from pipeline.teacher.sparsify.gpu.plan import bytes_of_row
from pipeline.teacher.sparsify.scheme import capture_scheme

FEWEST_ROUNDS, MOST_ROUNDS = 4, 120
SMALL_ERROR = 0.008
VOCAB_OF_A_GPU = 151_936
"""Of Qwen 2.5 and 3; float32 logits, as vLLM's head gives them."""
SCHEMES = {
    name: capture_scheme(CaptureSettings(scheme="threshold", temperatures=grid)).first_phase
    for name, grid in (("threshold", (1.0,)), ("threshold, two temperatures", (1.0, 2.0)))
}
SCHEMES["top64"] = SparseScheme(64, (1.0, 2.0))
"""As the settings make them, and as a device draws by them."""
PLAIN = "prompt log-probs 64, flat"
"""vLLM's own, in its form without an object for each entry."""


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


@dataclass(slots=True)
class Rounds:
    """CPU seconds of each call in each round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, above: str, *below: str) -> tuple[float, float]:
        """Return the mean over rounds of one call's time over that of others, and its error."""
        ratios = [
            whole / sum(parts)
            for whole, *parts in zip(
                self.seconds[above], *(self.seconds[name] for name in below), strict=True
            )
        ]
        return statistics.fmean(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5


def rounds_of(calls: dict[str, Callable[[], object]], above: str, *below: str) -> Rounds:
    """Measure calls in turn after one warm-up round, until the ratio's error is small."""
    rounds = Rounds({name: [] for name in calls})
    for number in range(MOST_ROUNDS + 1):
        names = list(calls)[:: 1 if number % 2 else -1]
        for name in names:
            started = time.process_time()
            calls[name]()
            if number:
                rounds.seconds[name].append(time.process_time() - started)
        if number >= FEWEST_ROUNDS and rounds.ratio(above, *below)[1] < SMALL_ERROR:
            break
    return rounds


def measure(
    folder: Path, requests: list[CaptureRequest], length: int, names: Sequence[str]
) -> Iterator[tuple[str, Rounds]]:
    """Yield the times of each scheme's engine, and of vLLM's own log-probs."""
    settings = TeacherSettings(model=str(folder), batch_tokens=2048)
    bare_requests = [CaptureRequest(r.sample_id, r.input_ids_L, r.rows_N[:0]) for r in requests]
    rows = sum(r.rows_N.size for r in requests)
    for name, scheme in SCHEMES.items():
        if name not in names:
            continue
        engine = VllmEngine(
            settings, CaptureSettings(), folder=folder, scheme=scheme, max_length=length
        )
        calls: dict[str, Callable[[], object]] = {
            "bare": lambda e=engine: e.capture(bare_requests),  # type: ignore[misc]
            "head": head_product(engine, requests, rows),
            "capture": lambda e=engine: e.capture(requests),  # type: ignore[misc]
        }
        yield name, rounds_of(calls, "capture", "bare", "head")
        engine.close()
    if PLAIN not in names:
        return
    path = TeacherSettings(model=str(folder), batch_tokens=2048, capture_path="prompt_logprobs")
    engine = VllmEngine(
        path, CaptureSettings(), folder=folder, scheme=SparseScheme(64, (1.0,)), max_length=length
    )
    calls = {
        "bare": lambda: _prefill(engine, requests),
        "capture": lambda: engine.capture(requests),
    }
    yield PLAIN, rounds_of(calls, "capture", "bare")
    engine.close()


def head_product(
    engine: VllmEngine, requests: list[CaptureRequest], rows: int
) -> Callable[[], None]:
    """Return what multiplies as many rows with the head as the requests ask for, as they do."""
    import torch

    from pipeline.teacher.engines.vllm_pooler import CapturePooler

    found: list[tuple[CapturePooler, torch.Tensor]] = []
    columns = CapturePooler._columns

    def keep(pooler: CapturePooler, hidden_TD: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        found.append((pooler, hidden_TD.clone()))
        return columns(pooler, hidden_TD, *rest)

    CapturePooler._columns = keep  # type: ignore[method-assign]
    engine.capture(requests[:1])
    CapturePooler._columns = columns  # type: ignore[method-assign]
    pooler, hidden_TD = found[0]
    hidden_RD = hidden_TD[torch.arange(rows) % len(hidden_TD)]

    def multiply() -> None:
        with torch.inference_mode():
            for part_rD in hidden_RD.split(pooler._head_rows):
                pooler._compute_logits(part_rD)

    return multiply


def bytes_on_a_gpu() -> float:
    """Print the bytes that the kernels move for a row; return the most reads of the logits.

    Held-out rows are told beside it: there are a few hundred of them, however large the corpus is.
    """
    print(f"reads of a row of {VOCAB_OF_A_GPU:,} float32 logits that the kernels' bytes come to")
    reads = {name: reads_of_row(scheme) for name, scheme in SCHEMES.items()}
    heldout = capture_scheme(CaptureSettings()).heldout
    assert heldout is not None
    for name, value in (*reads.items(), ("top64, held-out rows", reads_of_row(heldout))):
        print(f"  {name:<28} {value:.3f}")
    return max(reads.values())


def reads_of_row(scheme: SparseScheme) -> float:
    """Return the bytes that the kernels move for a row over those of its logits."""
    row = bytes_of_row(scheme, vocab=VOCAB_OF_A_GPU, element_bytes=4)
    return row / (4 * VOCAB_OF_A_GPU)


def _prefill(engine: VllmEngine, requests: list[CaptureRequest]) -> None:
    """Prefill the prompts with vLLM's ordinary engine and nothing else."""
    from vllm import SamplingParams

    engine._llm.generate(
        [{"prompt_token_ids": r.input_ids_L.tolist()} for r in requests],
        SamplingParams(max_tokens=1, temperature=0.0, detokenize=False),
        use_tqdm=False,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=("embedded", "7b"), default="embedded")
    parser.add_argument("--tokens", type=int, default=1500)
    measurable = [*SCHEMES, PLAIN]
    parser.add_argument("--only", nargs="*", default=measurable, choices=measurable)
    arguments = parser.parse_args()
    reads = bytes_on_a_gpu()
    print(f"FIGURE reduction_bytes_over_logits {reads:.3f}", flush=True)
    with TemporaryDirectory() as scratch:
        if arguments.shape == "7b":
            folder, requests, length = shape_of_7b(arguments.tokens // 4, Path(scratch))
        else:
            folder, requests, length = embedded(arguments.tokens)
        tokens = sum(r.input_ids_L.size for r in requests)
        loss_tokens = sum(r.rows_N.size for r in requests)
        print(f"{tokens} tokens, {loss_tokens} supervised; CPU time, one thread, same engine")
        print(f"  {'':<28} over prefill     over prefill + head   rounds", flush=True)
        measured = {}
        for name, rounds in measure(folder, requests, length, arguments.only):
            measured[name] = rounds
            over = [shown(rounds.ratio("capture", "bare"))]
            over.append(shown(rounds.ratio("capture", "bare", "head")) if name in SCHEMES else "")
            line = f"  {name:<28} {over[0]:<16} {over[1]:<21} {len(rounds.seconds['bare'])}"
            print(line, flush=True)
    suffix = "_7b" if arguments.shape == "7b" else ""
    for name in ("top64", "threshold"):
        if name not in measured:
            continue
        rounds = measured[name]
        head = rounds.ratio("head", "bare")[0]
        print(f"  head's product alone, beside {name}: {1 + head:.3f}")
        print(f"FIGURE capture_cpu_ratio_{name}{suffix} {rounds.ratio('capture', 'bare')[0]:.3f}")
        value, error = rounds.ratio("capture", "bare", "head")
        print(f"FIGURE capture_over_head_{name}{suffix} {value:.3f}")
        print(f"FIGURE capture_over_head_{name}{suffix}_standard_error {error:.4f}")


def shown(ratio: tuple[float, float]) -> str:
    """Return a mean with its standard error."""
    return f"{ratio[0]:.3f} +- {ratio[1]:.3f}"


if __name__ == "__main__":
    main()
