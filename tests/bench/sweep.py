"""A sweep of N students from one cache, compared with the same sweep with the teacher in the loop.

    python -m tests.bench.sweep [--samples 24] [--real 2]

Both train the same student on the same packs with the same optimiser, one thread. In the loop (as
in the public sample) the teacher reads every pack of every run, and the loss compares full rows of
logits; from the cache the teacher reads the corpus once, in the project's stage one, and the loss
reads the sparse targets. Wall times and CPU seconds of `--real` runs of each kind are measured; CPU
seconds do not depend on other load. Times of more runs are the capture plus N times the mean run,
since all runs take the same steps. Models have random weights and the proportions of the public
sample (a 7B teacher, a 1.5B student: 4.6 times the parameters, a head of 49,152 rows), 1/83 of the
size.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from pipeline.cache.layout.manifest import read_manifest
from pipeline.storage import Store

TEMPERATURE, ALPHA, LENGTH = 2.0, 0.5, 256
SIZES = (1, 2, 4, 8)
EPOCHS = (1, 3)
"""Passes over the corpus of one run; the public sample makes three."""


def make_model(folder: Path, tokenizer: Any, *, hidden: int, layers: int, seed: int) -> Path:
    """Save a Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 256, 1),
        head_dim=64,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True, slots=True)
class Seconds:
    """Wall and CPU seconds."""

    wall: float
    cpu: float


class Clock:
    """Both times since the timer was created."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Seconds:
        return Seconds(time.perf_counter() - self._wall, time.process_time() - self._cpu)


def capture(teacher: Path, cache: Path, samples: int) -> Seconds:
    """Run stage one in this process; return its seconds."""
    from stages.cache_teacher import main

    flags = [
        "--teacher_model", teacher, "--teacher.engine", "transformers", "--dataset_name",
        "embedded", "--num_samples", samples, "--max_length", LENGTH, "--cache_dir", cache,
        "--corpus.heldout_fraction", "0.05", "--observe.log_level", "error",
    ]  # fmt: skip
    clock = Clock()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main([str(flag) for flag in flags])
    return clock.read()


def packs(cache: Path) -> list[Any]:
    """Return one epoch's packs as the student's stream gives them."""
    from pipeline.cache.io.reader import open_cache
    from pipeline.data.settings import DataSettings
    from pipeline.data.stream.train_stream import TrainStream

    stream = TrainStream(
        open_cache(str(cache)).source("train"),
        DataSettings(pack_length=LENGTH),
        seed=0,
        packs_per_step=1,
        rank=0,
        world_size=1,
        accumulation=1,
        pack_length=LENGTH,
        temperature=TEMPERATURE,
        uncached_temperature="reject",
    )
    with stream.iterate(0, stream.steps_per_epoch) as steps:
        return [step.micro_batches[0] for step in steps]


def train(
    student: Path,
    cache: Path,
    loss_of: Callable[[Any, Any], Any],
    *,
    fused: bool,
    most: int | None = None,
) -> Seconds:
    """Train one epoch, or `most` steps; return its seconds, reading of the cache included."""
    from pipeline.loss.head import install_distill_head
    from pipeline.loss.settings import LossSettings
    from pipeline.models.load import load_causal_lm

    model = load_causal_lm(student, dtype="float32").train()
    model.config.use_cache = False
    if fused:
        install_distill_head(model, LossSettings(temperature=TEMPERATURE, alpha=ALPHA))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    clock = Clock()
    for batch in packs(cache)[:most]:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return clock.read()


def loss_from_cache(model: Any, batch: Any) -> Any:
    """Return the project's loss: sparse targets, inside the head."""
    from pipeline.student.training.module import StudentModule

    loss, _ = StudentModule(model)(
        batch.input_ids_1T, batch.position_ids_1T, batch.lengths, batch.label_index_N,
        batch.ids_NK, batch.logprobs_NK, batch.inclusion_NK, batch.log_z_N, batch.entropy_N,
        batch.label_ids_N, scale=1.0 / max(batch.num_loss_tokens, 1),
    )  # fmt: skip
    return loss


def loss_in_the_loop(teacher: Any) -> Callable[[Any, Any], Any]:
    """Return the sample's loss: both models' full logits, compared row by row."""

    def loss_of(model: Any, batch: Any) -> Any:
        inputs = {
            "input_ids": batch.input_ids_1T,
            "position_ids": batch.position_ids_1T,
            "use_cache": False,
        }
        with torch.no_grad():
            teacher_NV = teacher(**inputs).logits[0].index_select(0, batch.label_index_N)
        student_NV = model(**inputs).logits[0].index_select(0, batch.label_index_N)
        divergence = functional.kl_div(
            functional.log_softmax(student_NV / TEMPERATURE, -1),
            functional.softmax(teacher_NV / TEMPERATURE, -1),
            reduction="batchmean",
        )
        entropy = functional.cross_entropy(student_NV, batch.label_ids_N)
        return ALPHA * TEMPERATURE**2 * divergence + (1 - ALPHA) * entropy

    return loss_of


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=24, help="documents of the corpus")
    parser.add_argument("--real", type=int, default=2, help="runs of each kind that are measured")
    parser.add_argument("--hidden", type=int, default=512, help="of the teacher")
    parser.add_argument("--layers", type=int, default=15, help="of the teacher")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from pipeline.models.load import load_causal_lm
    from pipeline.models.resolve import resolve_model
    from pipeline.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model("embedded", role="teacher").path)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        teacher = make_model(
            root / "teacher", tokenizer, hidden=options.hidden, layers=options.layers, seed=0
        )
        student = make_model(root / "student", tokenizer, hidden=256, layers=6, seed=1)
        # A small warm-up, so that no kind includes the first use of the libraries.
        capture(teacher, root / "warm", 4)
        in_loop = loss_in_the_loop(load_causal_lm(teacher, dtype="float32").eval())
        train(student, root / "warm", loss_from_cache, fused=True, most=1)
        train(student, root / "warm", in_loop, fused=False, most=1)

        captured = capture(teacher, root / "cache", options.samples)
        cached, online = [], []
        for _ in range(options.real):
            cached.append(train(student, root / "cache", loss_from_cache, fused=True))
            online.append(train(student, root / "cache", in_loop, fused=False))
        report(root / "cache", captured, cached, online)


def report(cache: Path, captured: Seconds, cached: list[Seconds], online: list[Seconds]) -> None:
    """Print the table and the figures."""
    tokens = read_manifest(Store(str(cache))).total().tokens
    run, loop = (statistics.mean(s.cpu for s in runs) for runs in (cached, online))
    print(f"{tokens} tokens. CPU: capture {captured.cpu / loop:.2f}, a run from the cache")
    print(f"{run / loop:.2f} of a run with the teacher in the loop; {len(cached)} runs of each\n")
    print(f"{'epochs':>6} {'points':>6} {'teacher passes':>18} {'wall ratio':>10} {'CPU':>6}")
    figures = {}
    for epochs in EPOCHS:
        for size in SIZES:
            real = epochs == 1 and size <= len(cached)
            ratios = [
                _ratio(
                    getattr(captured, kind),
                    [getattr(s, kind) for s in cached],
                    [getattr(s, kind) for s in online],
                    runs=size * epochs,
                    real=real,
                )
                for kind in ("wall", "cpu")
            ]
            name = f"sweep_speedup_n{size}" + ("" if epochs == 1 else f"_{epochs}_epochs")
            figures[name], figures[f"{name}_cpu"] = ratios
            how = "measured" if real else "from the mean run"
            print(
                f"{epochs:>6} {size:>6} {f'{size * epochs} in the loop, 1':>18} {ratios[0]:>10.2f} "
                f"{ratios[1]:>6.2f}  {how}"
            )
    print()
    for name, value in figures.items():
        print(f"FIGURE {name} {value:.3f}")


def _ratio(
    captured: float, cached: list[float], online: list[float], *, runs: int, real: bool
) -> float:
    """Return the time of `runs` epochs in the loop over that from the cache, capture included."""
    if real:
        return sum(online[:runs]) / (captured + sum(cached[:runs]))
    return runs * statistics.mean(online) / (captured + runs * statistics.mean(cached))


if __name__ == "__main__":
    main()
