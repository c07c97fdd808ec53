"""A training step from the cache, compared with fine-tuning the same student in the same engine.

    python -m tests.bench.step [--tokens 1024] [--rounds 5] [--layers 10] [--supervised 1.0]

Three processes, one thread each, take turns, one step a turn; a time is the median of the CPU
seconds of a step, all threads of the process counted. All train the embedded student (10 of the 30
layers of SmolLM2-135M, V = 49,152) in float32 through the pipeline's DeepSpeed engine with the same
packs and the same optimiser:

- `cache`: the pipeline's own step. Reads and decodes shards (top 64, T = 1, alpha = 0.5), computes
  loss and gradient in the head, sums the logged values.
- `finetune`: cross-entropy by transformers' own loss on its own logits, from token ids in
  memory: the cost of a step without a teacher and without a cache.
- `online`: the teacher (all 30 layers) in the loop, the dense forward KL on [tokens, V] arrays.

Memory is the peak of a process from its second step on, over that of `finetune`; the resident set,
interpreter and libraries included. The cache is written by stage one from a one-layer teacher with
the same tokenizer: the values of the targets do not change the cost of a step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ARMS = ("cache", "finetune", "online")
"""`--arms` also accepts `compiled`: the step from the cache with `train.torch_compile`."""
Step = Callable[[], None]


def make_cache(folder: Path, *, tokens: int, rows: int, supervised: float) -> Path:
    """Run stage one on `rows` chats of `tokens` tokens or more, a share `supervised` the answer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from pipeline.models.resolve import resolve_model
    from stages.cache_teacher import main as cache_teacher

    source = resolve_model("embedded", role="teacher").path
    config = AutoConfig.from_pretrained(source)
    config.update(
        {
            "num_hidden_layers": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "initializer_range": 0.3,
        }
    )
    torch.manual_seed(0)
    teacher = folder / "teacher"
    AutoModelForCausalLM.from_config(config).save_pretrained(teacher)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(teacher)
    draw = random.Random(0)

    def text(count: int) -> str:
        return tokenizer.decode([draw.randrange(1_000, 40_000) for _ in range(count)])

    lines = []
    for _ in range(rows + 5):
        if supervised >= 1:
            lines.append({"text": text(2 * tokens)})
            continue
        question, answer = text(int(tokens * (1 - supervised))), text(2 * tokens)
        lines.append(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
    corpus = folder / "corpus.jsonl"
    corpus.write_text("\n".join(map(json.dumps, lines)) + "\n")
    code = cache_teacher(
        ["--teacher_model", str(teacher), "--teacher.engine", "transformers",
         "--dataset_name", str(corpus), "--max_length", str(tokens),
         "--corpus.heldout_fraction", "0.6", "--corpus.heldout_samples", "1",
         "--capture.top_k", "64", "--cache_dir", str(folder / "cache")]
    )  # fmt: skip
    if code:
        sys.exit(code)
    return folder / "cache"


def pruned_student(folder: Path, layers: int) -> Path:
    """Return the embedded model pruned to `layers` evenly chosen layers."""
    from pipeline.models.resolve import resolve_model
    from pipeline.student.build.prune import prune_model

    kept = [round(i * 29 / max(layers - 1, 1)) for i in range(layers)]
    return prune_model(resolve_model("embedded", role="teacher").path, kept, folder / "student")


def prepare(arm: str, cache: Path, student: Path, rounds: int) -> Step:
    """Build one arm; the returned function takes its next step."""
    from pipeline.api.settings import StudentRun
    from pipeline.data.stream.train_stream import TrainStream
    from pipeline.loss.head import install_distill_head
    from pipeline.loss.settings import LossSettings
    from pipeline.student.build.model import compile_layers, load_student, optimizer_groups
    from pipeline.student.inputs import open_inputs
    from pipeline.student.settings.student import OutputSettings, StudentSettings
    from pipeline.student.settings.train import TrainSettings
    from pipeline.student.training.deepspeed_engine import DeepSpeedEngine, init_distributed
    from pipeline.student.training.distributed import read_distributed
    from pipeline.student.training.loop import LoopSettings, TrainLoop
    from pipeline.student.training.module import StudentModule

    train = TrainSettings(per_device_train_batch_size=1, gradient_accumulation_steps=1)
    run = StudentRun(
        cache_dir=str(cache), student=StudentSettings(model=str(student)),
        loss=LossSettings(temperature=1, alpha=0.5), train=train,
        output=OutputSettings(output_dir=str(cache.parent / arm)), seed=0,
    )  # fmt: skip
    inputs = open_inputs(run)
    distributed = read_distributed()
    init_distributed(distributed, timeout_s=60)
    stream = TrainStream(
        inputs.cache.source("train"), inputs.data, seed=0, packs_per_step=1, rank=0, world_size=1,
        accumulation=1, pack_length=inputs.pack_length(), temperature=1.0,
    )  # fmt: skip
    model = load_student(student, dtype="float32")
    if arm in ("cache", "compiled"):
        install_distill_head(model, inputs.loss, valid_vocab=None)
        module: Any = StudentModule(model)
        if arm == "compiled":
            compile_layers(model)
    else:
        module = _fine_tuned(model) if arm == "finetune" else _online(model)
    engine = DeepSpeedEngine(
        module, train, dtype="float32", distributed=distributed, total_steps=1000,
        optimizer_groups=optimizer_groups(model, train.weight_decay),
    )  # fmt: skip
    if arm in ("cache", "compiled"):
        none: Any = None
        settings = LoopSettings(
            train=train, loss=inputs.loss, divergence="kl_bucketed", seed=0, total_steps=1000,
            output_dir=inputs.output_dir,
        )  # fmt: skip
        loop = TrainLoop(
            settings, engine=engine, stream=stream, evaluation=none, sinks=none, checkpoints=none
        )
        steps = stream.iterate(0, rounds)

        def from_cache() -> None:
            batch = next(steps)
            loop._step(batch)
            loop._read(batch)

        return from_cache
    ready = _token_ids(stream, rounds)
    return lambda: engine.train_step([next(ready)]) and None


def _token_ids(stream: Any, rounds: int) -> Iterator[dict[str, Any]]:
    """Return the same packs as plain token ids and labels, all read before the first step."""
    batches = []
    for step in stream.steps(0, rounds):
        (batch,) = step.micro_batches
        labels = batch.input_ids_1T.new_full(batch.input_ids_1T.shape, -100)
        labels[0, batch.label_index_N + 1] = batch.label_ids_N
        batches.append(
            {
                "input_ids": batch.input_ids_1T,
                "position_ids": batch.position_ids_1T,
                "labels": labels,
            }
        )
    return iter(batches)


def _fine_tuned(model: Any) -> Any:
    from torch import nn

    class FineTuned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Any) -> Any:
            return (self.model(**inputs, use_cache=False).loss,)

    return FineTuned()


def _online(model: Any) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional

    from pipeline.models.load import load_causal_lm
    from pipeline.models.resolve import resolve_model

    teacher = load_causal_lm(resolve_model("embedded", role="teacher").path, dtype="float32").eval()
    teacher.requires_grad_(False)

    class Online(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, labels: Any, **inputs: Any) -> Any:
            supervised = labels[0, 1:] != -100
            with torch.no_grad():
                teacher_NV = teacher(**inputs, use_cache=False).logits[0, :-1][supervised]
                log_p_NV = teacher_NV.log_softmax(-1)
            logits_NV = self.model(**inputs, use_cache=False).logits[0, :-1][supervised]
            log_q_NV = logits_NV.log_softmax(-1)
            kl = functional.kl_div(log_q_NV, log_p_NV, reduction="batchmean", log_target=True)
            return (0.5 * kl + 0.5 * functional.nll_loss(log_q_NV, labels[0, 1:][supervised]),)

    return Online()


def work(pipe: Connection, arm: str, cache: Path, student: Path, rounds: int) -> None:
    """Run a step at each request of the parent; reply with CPU seconds and peak bytes."""
    import torch

    from pipeline.observe.logs import configure_logging
    from pipeline.observe.memory import peak_rss_bytes

    configure_logging("warning")
    torch.set_num_threads(1)
    step = prepare(arm, cache, student, rounds)
    step()  # the optimiser's state, the allocator's arenas
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    pipe.send(None)
    while pipe.recv():
        start = time.process_time()
        step()
        pipe.send((time.process_time() - start, peak_rss_bytes()))


def main() -> None:
    """Print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="of a pack, one pack a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as root:
        folder, steps = Path(root), args.rounds + 1
        cache = make_cache(folder, tokens=args.tokens, rows=steps, supervised=args.supervised)
        student = pruned_student(folder, args.layers)
        pipes: dict[str, Any] = {}
        for arm in args.arms:
            pipes[arm], theirs = context.Pipe()
            context.Process(
                target=work, args=(theirs, arm, cache, student, steps), daemon=True
            ).start()
            pipes[arm].recv()
        seconds: dict[str, list[float]] = {arm: [] for arm in args.arms}
        peak: dict[str, int] = {}
        for turn in range(args.rounds):
            for arm, pipe in pipes.items():
                pipe.send(True)
                taken, peak[arm] = pipe.recv()
                seconds[arm].append(taken)
            taken_now = ", ".join(f"{arm} {seconds[arm][-1]:.2f} s" for arm in args.arms)
            print(f"round {turn + 1}: {taken_now}", file=sys.stderr, flush=True)
        for pipe in pipes.values():
            pipe.send(False)
    print(f"{'step':<10} {'CPU s':>8} {'/ finetune':>11} {'peak MiB':>10} {'/ finetune':>11}")
    base = statistics.median(seconds["finetune"])
    for arm in args.arms:
        middle = statistics.median(seconds[arm])
        print(
            f"{arm:<10} {middle:>8.2f} {middle / base:>11.3f} {peak[arm] >> 20:>10} "
            f"{peak[arm] / peak['finetune']:>11.3f}"
        )
    print(f"FIGURE step_over_finetune {statistics.median(seconds['cache']) / base:.3f}")
    print(f"FIGURE step_memory_over_finetune {peak['cache'] / peak['finetune']:.3f}")


if __name__ == "__main__":
    main()
